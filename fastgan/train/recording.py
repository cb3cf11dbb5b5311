"""The training step on the CPU as a recording: the operators it calls, noted once, and from then on called again without Python.

What autograd, modules and optimizers do between two operators takes a small network's step longer than its arithmetic. As in a CUDA graph
nothing of that happens any more, and what changes from step to step has to come by tensors.
"""

import contextlib
import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastgan import _extension


class CPURecorder:
    """Records work on the CPU and repeats it; see :class:`fastgan.train.graph.CUDARecorder`.

    Before a recording is used it is tried, on other inputs and with other random numbers: it must give what the work itself gives, to the
    bit.

    Args:
        parameters: whose gradients, where the work leaves any, every replay fills anew.
        trainer: whose ``objective.progress`` the work must not look at.
    """

    name = "a recording"
    draws_on_cpu = True
    behind = 0

    def __init__(self, parameters: Iterable[nn.Parameter], trainer: Any):
        self._parameters, self._trainer = list(parameters), trainer

    def warm_up(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def forget(self) -> None:
        self._recording = None

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
        recording, inputs, objective = _extension._C.Recording(), list(inputs), self._trainer.objective
        if objective.no_recording is not None:  # of one that came after the trainer was made
            raise RuntimeError(objective.no_recording)
        with _State() as state:
            try:
                objective._recorded = True
                with _Recorder(recording, state):
                    values = function()
                gradients = self._gradients()
                recording.end([values, *gradients.values()])
                self._try(recording, function, inputs, values, gradients, state)
            except Exception as error:
                raise RuntimeError(str(error)) from error
            finally:
                objective._recorded = False
                state.restore()
        for parameter in self._parameters:
            parameter.grad = gradients.get(parameter)
        self._recording = recording
        return values

    def _try(self, recording: Any, function: Callable[[], Tensor], inputs: list[Tensor], values: Tensor,
             gradients: dict[nn.Parameter, Tensor], state: "_State") -> None:
        random, results = torch.get_rng_state(), []
        for run in (function, recording.replay):
            state.restore()
            torch.set_rng_state(random)
            for each in inputs:
                each.copy_(each.flip(0).mul(0.75 if each.is_floating_point() else 1))
            returned = run()
            new = (self._gradients(), returned) if run is function else (gradients, values)
            results.append([_digest(tensor) for tensor in (*new[0].values(), new[1], torch.get_rng_state(), *state.memory)])
            for parameter in self._parameters:  # less memory; those of the recording are in `gradients`
                parameter.grad = None
        if results[0] != results[1]:
            raise RuntimeError("repeated, the step gave other numbers than the step itself")

    def _gradients(self) -> dict[nn.Parameter, Tensor]:
        return {parameter: parameter.grad for parameter in self._parameters if parameter.grad is not None}

    def replay(self) -> None:
        """Do the work again."""
        self._recording.replay()

    def fetch(self, values: Tensor) -> Callable[[], list[float]]:
        """``values`` as they are now."""
        return values.clone().tolist


def _digest(tensor: Tensor) -> bytes:
    """Of a tensor's bits: two tensors need not be held to be compared, and NaN equals itself."""
    return hashlib.blake2b(tensor.detach().flatten().view(torch.uint8).numpy()).digest()


class _State:
    """All memory that a recording found, and what it was before; the random numbers to come, too. In a file, as far as there is room
    for one: at this time there is more in memory than at any other.

    Attributes:
        memory: uint8 tensors.
    """

    def __init__(self):
        self.memory: list[Tensor] = []
        self._random = torch.get_rng_state()
        self._kept: list[Tensor] = []  # what the last of them were, those that are not in the file
        try:
            # A buffer would tell that the disk is full only when the file is read.
            self._file = tempfile.TemporaryFile(buffering=0)
        except OSError:
            self._file = None

    def __enter__(self) -> "_State":
        return self

    def __exit__(self, *error: Any) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, memory: Tensor) -> None:
        if self._kept or not self._written(memory):
            self._kept.append(memory.clone())
        self.memory.append(memory)

    def _written(self, memory: Tensor) -> bool:
        """Whether the file has taken it."""
        if self._file is None:
            return False
        rest = memory.numpy().data
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            return False
        return True

    def restore(self) -> None:
        in_file = len(self.memory) - len(self._kept)
        if self._file is not None:
            self._file.seek(0)
        for memory in self.memory[:in_file]:
            rest = memory.numpy().data
            while rest:
                rest = rest[self._file.readinto(rest) :]
        for memory, kept in zip(self.memory[in_file:], self._kept):
            memory.copy_(kept)
        torch.set_rng_state(self._random)


class _Recorder(TorchDispatchMode):
    """Notes every operator that is called inside.

    Raises:
        RuntimeError: one tells Python a number, on which the work may then depend.
    """

    def __init__(self, recording: Any, state: _State):
        super().__init__()
        self._recording, self._state = recording, state

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function.namespace == "profiler":
            return function(*args, **kwargs)
        # The fastgan operators' only other result says whether they took the call.
        if function.namespace != "fastgan" and not all("Tensor" in str(each.type) for each in function._schema.returns):
            raise RuntimeError(f"the host reads a value, by {function}")
        for memory in self._recording.call(function._schema.name, function._schema.overload_name, *args, **kwargs):
            self._state.add(memory)
        result = function(*args, **kwargs)
        self._recording.called(list(_tensors(result)))
        return result


def _tensors(result: Any) -> Iterator[Tensor | None]:
    if isinstance(result, (list, tuple)):
        for each in result:
            yield from _tensors(each)
    elif result is None or isinstance(result, Tensor):
        yield result
