"""Every public name has a docstring that says what its arguments are, what comes back, and what is raised."""

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap

import pytest

MODULES = (
    "fastgan", "fastgan.ops", "fastgan.nn", "fastgan.models", "fastgan.losses", "fastgan.optim", "fastgan.data", "fastgan.train",
    "fastgan.metrics.distances", "fastgan.metrics.features", "fastgan.metrics.clustering", "fastgan.metrics.generator",
    "fastgan.laboratory",
)  # fmt: skip


def public_items():
    """(qualified name, object) of every public function and class, and of a class's own methods and properties."""
    found = {}
    for name in MODULES:
        module = importlib.import_module(name)
        names = getattr(module, "__all__", None) or [
            key for key, value in vars(module).items()
            if not key.startswith("_") and getattr(value, "__module__", None) == name
        ]  # fmt: skip
        for key in names:
            item = getattr(module, key)
            if inspect.isfunction(item) or inspect.isclass(item):
                found.setdefault(item, f"{name}.{key}")
    return found


def public_members():
    for item, name in public_items().items():
        if inspect.isclass(item):
            for key, member in vars(item).items():
                if not key.startswith("_") and key not in ("forward", "extra_repr") and (inspect.isfunction(member) or isinstance(member, property)):
                    yield pytest.param(item, key, id=f"{name}.{key}")


def sections(item):
    """{"": text before the first section, "Args": its text, ...} of a docstring in Google style."""
    parts = re.split(r"^(Args|Attributes|Returns|Raises):$", inspect.getdoc(item) or "", flags=re.MULTILINE)
    return {"": parts[0].strip()} | dict(zip(parts[1::2], parts[2::2]))


def documented_names(text):
    entries = re.findall(r"^    ([\w*, \\]+):", text, re.MULTILINE)
    return {name.strip().lstrip("*\\") for entry in entries for name in entry.split(",")}


def raises_itself(function):
    """Whether there is a raise in the body, except inside a try, which may catch it."""

    def found(node):
        if isinstance(node, ast.Raise):
            return True
        return not isinstance(node, ast.Try) and any(map(found, ast.iter_child_nodes(node)))

    return found(ast.parse(textwrap.dedent(inspect.getsource(function))))


def needs_no_arguments_explained(item):
    """Records, configurations (their settings carry a help text) and classes without a constructor."""
    if dataclasses.is_dataclass(item):
        fields = [field for field in dataclasses.fields(item) if "help" not in field.metadata]
        return all(re.search(rf"\b{field.name}\b", inspect.getdoc(item)) for field in fields if field.name != "config")
    return issubclass(item, tuple) or "__init__" not in vars(item)


@pytest.mark.parametrize("item", [pytest.param(item, id=name) for item, name in public_items().items()])
def test_docstring_matches_the_signature(item):
    parts = sections(item)
    assert parts[""], "no docstring"
    function = item.__init__ if inspect.isclass(item) else item
    if not (inspect.isclass(item) and needs_no_arguments_explained(item)):
        parameters = {name for name in inspect.signature(function).parameters if name != "self"}
        assert documented_names(parts.get("Args", "")) == parameters
        if inspect.isfunction(item) and item.__annotations__.get("return", "") is not None:
            assert "Returns" in parts
        if raises_itself(function):
            assert "Raises" in parts


@pytest.mark.parametrize("owner, name", list(public_members()))
def test_methods_and_properties_are_explained(owner, name):
    documented = [vars(base)[name].__doc__ for base in owner.__mro__ if name in vars(base) and vars(base)[name].__doc__]
    assert documented, "no docstring"
    member = vars(owner)[name]
    if inspect.isfunction(member):
        for parameter in inspect.signature(member).parameters:
            assert parameter == "self" or re.search(rf"\b{parameter}\b", documented[0]), f"{parameter} is not explained"
