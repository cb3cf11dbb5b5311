"""What a captured step has read once and for all, and whether it still is so."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

_PLAIN = (bool, int, float, str, tuple, type(None))
_OF_THE_TRAINER = ("_progress", "_recorded")  # what it sets on the objective


class Settings:
    """The settings of modules, optimizers and other objects as they are when this is made: their plain values, and which tensors and
    modules they hold, where in memory and whether trained.

    Finding them takes longer than comparing them later, which is done at every step.

    Args:
        reads: returns the objects.
    """

    def __init__(self, reads: Callable[[], Iterable[Any]]):
        self._reads, self._objects = reads, list(reads())
        # (whose, its name, what holds it, where in that)
        self._places = [place for each in self._objects for place in _places(each)]
        self._values = [container[key] for _, _, container, key in self._places]
        self._plain = self._where(_PLAIN)
        self._held = self._where((Tensor, nn.Module, dict, list))
        self._parameters = list({id(value): value for value in self._values if isinstance(value, nn.Parameter)}.values())
        # A recording on the CPU follows a parameter that is given other memory.
        self._on_device = [value for value in self._values if isinstance(value, Tensor) and not value.is_cpu]
        self._containers = list({id(container): container for _, _, container, _ in self._places}.values())
        self._states, self._before = list(map(_state, self._values)), self._read()

    def _where(self, kind: Any) -> list[tuple[Any, Any]]:
        return [(container, key) for (_, _, container, key), value in zip(self._places, self._values) if isinstance(value, kind)]

    def _read(self) -> list[list[Any]]:
        return [
            [container[key] for container, key in self._plain],
            [id(container[key]) for container, key in self._held],
            [parameter.requires_grad for parameter in self._parameters],
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
        except LookupError:  # something has gone
            pass
        for (owner, name, container, key), state in zip(self._places, self._states):
            try:
                same = _state(container[key]) == state
            except LookupError:
                same = False
            if not same:
                return f"{type(owner).__name__}.{name}"
        return "the number of settings"


def _places(owner: Any) -> Iterator[tuple[Any, str, Any, Any]]:
    """Where an object has its settings."""
    if isinstance(owner, Optimizer):
        yield from ((owner, name, vars(owner), name) for name in ("param_groups", "state"))  # which load_state_dict() replaces
        yield from ((owner, "state", owner.state, parameter) for parameter in owner.state)
        for number, group in enumerate(owner.param_groups):
            yield owner, "param_groups", owner.param_groups, number
            yield from ((owner, name, group, name) for name in group)
            yield from ((owner, "params", group["params"], number) for number in range(len(group["params"])))
        yield from ((owner, name, state, name) for state in owner.state.values() for name in state)
        return
    values, is_module = vars(owner), isinstance(owner, nn.Module)
    for name, value in values.items():
        if isinstance(value, _PLAIN) and name not in _OF_THE_TRAINER and not (is_module and name.startswith("_")):
            yield owner, name, values, name
        elif isinstance(value, nn.Module):
            yield owner, name, values, name
            yield from _places(value)
    if is_module:
        for held in (owner._parameters, owner._buffers, owner._modules):
            yield from ((owner, name, held, name) for name in held)
        for child in owner._modules.values():
            if child is not None:
                yield from _places(child)


def _state(value: Any) -> Any:
    if isinstance(value, Tensor):
        return id(value), None if value.is_cpu else value.data_ptr(), value.requires_grad
    return value if isinstance(value, _PLAIN) else id(value)
