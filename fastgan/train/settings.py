"""What a captured step has read once and for all, and whether it still is so."""

import numbers
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

_OF_THE_TRAINER = ("_progress", "_recorded")  # what it sets on the objective
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_optimizer_step_pre_hooks",
          "_optimizer_step_post_hooks")  # fmt: skip

# Whose a setting is, its name, what holds it, where in that.
Place = tuple[Any, str, Any, Any]


class Settings:
    """The settings of modules, optimizers and other objects as they are when this is made: plain values; which tensors, modules and
    other things they hold; of parameters also dtype, strides and whether they are trained; the number of hooks.

    Finding them takes longer than comparing them later, which is done at every step.

    Args:
        reads: returns the objects.
    """

    def __init__(self, reads: Callable[[], Iterable[Any]]):
        self._reads, self._objects = reads, list(reads())
        seen: set[int] = set()
        self._places = [place for each in self._objects for place in _places(each, seen)]
        values = [container[key] for _, _, container, key in self._places]
        self._values = values  # kept alive: another object would get the identity of one that has gone
        self._plain = [place[2:] for place, value in zip(self._places, values) if _is_plain(value)]
        self._held = [place[2:] for place, value in zip(self._places, values) if not _is_plain(value)]
        self._parameters = list({id(value): value for value in values if isinstance(value, nn.Parameter)}.values())
        # A recording on the CPU follows a parameter that is given other memory.
        self._on_device = [value for value in values if isinstance(value, Tensor) and not value.is_cpu]
        self._containers = list({id(container): container for _, _, container, _ in self._places}.values())
        owners = {id(owner): owner for owner, *_ in self._places}.values()
        self._containers += [vars(owner)[name] for owner in owners for name in _HOOKS if name in vars(owner)]
        self._states, self._before = list(map(_state, values)), self._read()

    def _read(self) -> list[list[Any]]:
        return [
            [container[key] for container, key in self._plain],
            [id(container[key]) for container, key in self._held],
            [(parameter.requires_grad, parameter.dtype, parameter.stride()) for parameter in self._parameters],
            [tensor.data_ptr() for tensor in self._on_device],
            list(map(len, self._containers)),
        ]

    def change(self) -> str | None:
        """The name of a setting that is another one now, None where none is."""
        for new, old in zip(self._reads(), self._objects):
            if new is not old:
                return type(old).__name__
        try:
            if self._read() == self._before:
                return None
        except (LookupError, RuntimeError, ValueError):  # something has gone, or is now a tensor or an array
            pass
        for place, state in zip(self._places, self._states):
            if _has_changed(place, state):
                return _name(place)
        return "the number of settings"

    def change_of_plain_values(self) -> str | None:
        """The same of plain values alone, such as a counter."""
        for place, state in zip(self._places, self._states):
            if _is_plain(state) and _has_changed(place, state):
                return _name(place)
        return None


def _places(owner: Any, seen: set[int]) -> Iterator[Place]:
    """Where an object has its settings, and the modules in it, unless they have been ``seen``."""
    if id(owner) in seen:
        return
    seen.add(id(owner))
    values = vars(owner)
    if isinstance(owner, Optimizer):
        yield from ((owner, name, values, name) for name in ("param_groups", "state"))  # which load_state_dict() replaces
        yield from ((owner, "state", owner.state, parameter) for parameter in owner.state)
        for number, group in enumerate(owner.param_groups):
            yield owner, "param_groups", owner.param_groups, number
            yield from ((owner, name, group, name) for name in group)
            yield from ((owner, "params", group["params"], number) for number in range(len(group["params"])))
        yield from ((owner, name, state, name) for state in owner.state.values() for name in state)
        return
    is_module = isinstance(owner, nn.Module)
    for name, value in values.items():
        # A module's other attributes may be what it notes in its forward.
        if name not in _OF_THE_TRAINER and not (is_module and (name.startswith("_") or not _is_plain(value))):
            yield owner, name, values, name
        if isinstance(value, nn.Module):
            yield from _places(value, seen)
    if is_module:
        for held in (owner._parameters, owner._buffers, owner._modules):
            yield from ((owner, name, held, name) for name in held.keys())
        for child in owner._modules.values():
            if child is not None:
                yield from _places(child, seen)


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (str, numbers.Number))  # bool and NumPy's numbers are numbers, too


def _state(value: Any) -> Any:
    if isinstance(value, Tensor):
        details = None if value.is_cpu else value.data_ptr(), value.requires_grad, value.dtype, value.stride()
        return [id(value), *details]
    return value if _is_plain(value) else [id(value)]  # a list, which is no plain value


def _has_changed(place: Place, state: Any) -> bool:
    _, _, container, key = place
    try:
        new = _state(container[key])
    except LookupError:
        return True
    return type(new) is not type(state) or new != state


def _name(place: Place) -> str:
    owner, name, _, _ = place
    return f"{type(owner).__name__}.{name}"
