"""The training step on the CPU as a recording: the operators it calls, noted once, and from then on called again without Python.

What autograd, modules and optimizers do between two operators takes a small network's step longer than its arithmetic. As in a CUDA graph
nothing of that happens any more, and what changes from step to step has to come by tensors.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastgan import _extension


class CPURecorder:
    """Records work on the CPU and repeats it; see :class:`fastgan.train.graph.CUDARecorder`.

    Before a recording is used it is tried, on other inputs, with other random numbers and at another progress of the run: it must give what
    the work itself gives, to the bit.

    Args:
        parameters: whose gradients, where the work leaves any, every replay fills anew.
        objective: whose ``progress`` the work might look at.
    """

    name = "a recording"
    draws_on_cpu = True
    behind = 0

    def __init__(self, parameters: Iterable[nn.Parameter], objective: Any):
        self._parameters, self._objective = list(parameters), objective

    def warm_up(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def rehearse(self) -> Iterator[list[str]]:
        yield []

    def capture(self, function: Callable[[], Tensor], inputs: Iterable[Tensor]) -> Tensor:
        """What ``function`` returns, a tensor that every :meth:`replay` fills anew; in the end nothing has been computed.

        Args:
            function: the work, which reads ``inputs``.

        Raises:
            RuntimeError: it did what cannot be repeated. Everything is as it was, but for gradients.
        """
        recording, random, inputs = _extension._C.Recording(), torch.get_rng_state(), list(inputs)
        progress = self._objective.progress
        try:
            with _Recorder(recording):
                values = function()
            gradients = self._gradients()
            recording.end([values, *gradients.values()])
            self._objective.progress = (progress + 0.5) % 1
            self._try(recording, function, inputs, values, gradients)
        except Exception as error:
            raise RuntimeError(str(error)) from error
        finally:
            self._objective.progress = progress
            _restore(recording.found(), random)
        for parameter in self._parameters:
            parameter.grad = gradients.get(parameter)
        recording.forget_found()
        self._recording = recording
        return values

    def _try(self, recording: Any, function: Callable[[], Tensor], inputs: list[Tensor], values: Tensor,
             gradients: dict[nn.Parameter, Tensor]) -> None:
        found, random, results = recording.found(), torch.get_rng_state(), []
        for run in (function, recording.replay):
            _restore(found, random)
            for each in inputs:
                each.copy_(each.flip(0).mul(0.75 if each.is_floating_point() else 1))
            returned = run()
            new = (self._gradients(), returned) if run is function else (gradients, values)
            new = [*new[0].values(), new[1], torch.get_rng_state(), *(memory for memory, _ in found)]
            results.append([tensor.flatten().view(torch.uint8).clone() for tensor in new])  # as NaN is no number that equals itself
        if len(results[0]) != len(results[1]) or not all(map(torch.equal, *results)):
            raise RuntimeError("repeated, the step gave other numbers than the step itself")

    def _gradients(self) -> dict[nn.Parameter, Tensor]:
        return {parameter: parameter.grad for parameter in self._parameters if parameter.grad is not None}

    def replay(self) -> None:
        """Do the work again."""
        self._recording.replay()

    def fetch(self, values: Tensor) -> Callable[[], list[float]]:
        """``values`` as they are now."""
        return values.clone().tolist


def _restore(found: Iterable[tuple[Tensor, Tensor]], random: Tensor) -> None:
    for memory, before in found:
        memory.copy_(before)
    torch.set_rng_state(random)


class _Recorder(TorchDispatchMode):
    """Notes every operator that is called inside.

    Raises:
        RuntimeError: one tells Python a number, on which the work may then depend.
    """

    def __init__(self, recording: Any):
        super().__init__()
        self._recording = recording

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function.namespace == "profiler":
            return function(*args, **kwargs)
        # The fastgan operators' only other result says whether they took the call.
        if function.namespace != "fastgan" and not all("Tensor" in str(each.type) for each in function._schema.returns):
            raise RuntimeError(f"the host reads a value, by {function}")
        self._recording.call(function._schema.name, function._schema.overload_name, *args, **kwargs)
        result = function(*args, **kwargs)
        self._recording.called(list(_tensors(result)))
        return result


def _tensors(result: Any) -> Iterator[Tensor | None]:
    if isinstance(result, (list, tuple)):
        for each in result:
            yield from _tensors(each)
    elif result is None or isinstance(result, Tensor):
        yield result
