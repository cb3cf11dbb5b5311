"""Settings of the documentation site. To build it: sphinx-build -W --keep-going docs build/docs"""

import dataclasses
import re
from pathlib import Path

from fastgan import build_info

project = "fastgan"
copyright = "the authors of fastgan"
release = build_info()["version"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = f"{project} {release}"
html_copy_source = False
html_static_path = ["static"]
html_css_files = ["site.css"]

smartquotes = False  # it would turn --flags into dashes

# Markdown pages link to headings of each other as GitHub does.
myst_heading_anchors = 3
# `name` in a docstring is code.
default_role = "literal"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_use_rtype = False
napoleon_use_ivar = True


def name_files_outside(app, page, source):
    """Links from a Markdown page to files that are not part of the site become their names."""
    folder, root = Path(app.srcdir, page).parent, Path(app.srcdir).parent

    def named(link):
        text, target = link[1], (folder / link[2].partition("#")[0]).resolve()
        if target.is_relative_to(app.srcdir) or not target.exists():
            return link[0]
        name = target.relative_to(root).as_posix()
        return text if name in text else f"{text} (`{name}`)"

    source[0] = re.sub(r"\[([^]]+)\]\((\.\./[^)]+)\)", named, source[0])


def own_settings(item):
    """The settings that a configuration class adds to its base, by the help texts of its fields."""
    if not (isinstance(item, type) and dataclasses.is_dataclass(item)):
        return []
    return [field for field in dataclasses.fields(item) if "help" in field.metadata and field.name in item.__annotations__]


def list_settings(app, what, name, item, options, lines):
    for field in own_settings(item):
        default = "" if field.default is None else f" Default: ``{field.default!r}``."
        choices = field.metadata["choices"]
        allowed = f" One of {', '.join(f'``{choice!r}``' for choice in choices)}." if choices else ""
        lines.append(f":param {field.name}: {field.metadata['help']}.{allowed}{default}")


def shorten_signature(app, what, name, item, options, signature, returns):
    return ("(**settings)", None) if own_settings(item) else None


def skip_tuple_fields(app, what, name, item, skip, options):
    """The fields of a NamedTuple are explained in its docstring; theirs only number them."""
    return True if type(item).__name__ == "_tuplegetter" else None


def setup(app):
    app.connect("source-read", name_files_outside)
    app.connect("autodoc-skip-member", skip_tuple_fields)
    app.connect("autodoc-process-docstring", list_settings)
    app.connect("autodoc-process-signature", shorten_signature)
