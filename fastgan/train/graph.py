"""The training step as a CUDA graph: everything it starts on the GPU, captured once and from then on started by one call.

A small step takes the host longer to start, kernel by kernel, than the GPU to compute. In a graph nothing of the step's Python
runs any more, so whatever changes from step to step reaches it through tensors: the batch and the latent vectors in static
buffers, the step size in Adam's groups. And nothing in it may wait for the device: the losses are looked at a step later. On the CPU a
recording (recording.py) takes the graph's place.
"""

import contextlib
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam

from fastgan import optim
from fastgan.data import Batch
from fastgan.train.distributed import random_state
from fastgan.train.outputs import say
from fastgan.train.settings import Settings

# Eager steps before the capture: in them libraries and Adam allocate what they keep, which a capture must not see. The last of
# them is watched for what a graph could not repeat.
WARM_UP = 3


def adam(parameters: Iterable[nn.Parameter], rate: float, betas: tuple[float, float], device: torch.device) -> Adam:
    """Fused Adam. Its step size is a tensor on the device, which a captured step reads; in a ``state_dict`` it is a number, so
    that checkpoints go from one device to the other."""
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    return with_rate_on_device(optim.Adam(parameters, lr=torch.tensor(rate, dtype=dtype, device=device), betas=betas, fused=True))


def with_rate_on_device(optimizer: Adam) -> Adam:
    """The optimizer, whose step size is a tensor; hooks make it a number in the ``state_dict``."""

    def save(optimizer: Adam, state: dict[str, Any]) -> None:
        for group in state["param_groups"]:
            group["lr"] = float(group["lr"])

    def load(optimizer: Adam, state: dict[str, Any]) -> dict[str, Any]:
        own = optimizer.param_groups[0]["lr"]  # not changed: the state may yet be refused
        rates = [torch.full_like(own, float(group["lr"])) for group in state["param_groups"]]
        return state | {"param_groups": [group | {"lr": rate} for group, rate in zip(state["param_groups"], rates)]}

    optimizer.register_state_dict_post_hook(save)
    optimizer.register_load_state_dict_pre_hook(load)
    return optimizer


def set_rate(optimizer: Adam, rate: float) -> None:
    """Set the step size: in place where it is a tensor, which a captured step reads."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


class CUDARecorder:
    """Captures work on the GPU in a graph and starts it again; steps before that run on the capture's stream.

    Attributes:
        name: of what it makes, for messages.
        draws_on_cpu: whether a replay can draw random numbers on the CPU.
        behind: how many of the last steps may still run on the device when their losses are looked at.
    """

    name = "a CUDA graph"
    draws_on_cpu = False
    behind = 1

    def __init__(self):
        self._stream = torch.cuda.Stream()
        self.forget()

    def forget(self) -> None:
        """Let go of what was captured."""
        self._graph = torch.cuda.CUDAGraph()

    @contextlib.contextmanager
    def warm_up(self) -> Iterator[None]:
        """Inside, work goes to the stream of the capture, so that it finds there what libraries keep for a stream."""
        stream = torch.cuda.current_stream()
        self._stream.wait_stream(stream)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            stream.wait_stream(self._stream)

    @contextlib.contextmanager
    def rehearse(self) -> Iterator[list[str]]:
        """As :meth:`warm_up`; in the list is afterwards where the work waited for the device, which a capture cannot do."""
        mode, waits = torch.cuda.get_sync_debug_mode(), []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                with self.warm_up():
                    yield waits
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        for each in caught:
            if "synchronizing CUDA operation" in str(each.message):
                waits.append(f"{each.filename}:{each.lineno}")
            elif "Synchronization debug mode" not in str(each.message):
                warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)

    def capture(self, function: Callable[[], Any], inputs: Iterable[Tensor]) -> Any:
        """What ``function`` returns, tensors that every :meth:`replay` fills anew; nothing is computed yet.

        Raises:
            RuntimeError: it did what a graph cannot hold. Nothing has been computed, and work goes on as before.
        """
        stream, device, pool = torch.cuda.current_stream(), torch.cuda.current_device(), torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.graph(self._graph, pool=pool, stream=self._stream):
                return function()
        except RuntimeError:
            # Where CUDA has already ended the capture, torch.cuda.graph leaves its stream current, the generator in a state that
            # draws no more, and the allocator waiting for the end.
            torch.cuda.set_stream(stream)
            generator = torch.cuda.default_generators[device]
            generator.graphsafe_set_state(generator.clone_state())
            with contextlib.suppress(RuntimeError):  # the allocator was told the end after all
                torch._C._cuda_endAllocateToPool(device, pool)
            raise

    def replay(self) -> None:
        """Start the captured work on the current stream."""
        self._graph.replay()

    def fetch(self, values: Tensor) -> Callable[[], list[float]]:
        """Starts to copy ``values`` from the device; the result waits for the copy and returns it."""
        copied = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
        done = torch.cuda.Event()
        done.record()

        def wait() -> list[float]:
            done.synchronize()
            return copied.tolist()

        return wait


class GraphedStep:
    """A training step that is captured in a graph after ``WARM_UP`` eager calls, and replayed from then on.

    Every call is a step of training, none is made twice, and which of them are replayed changes no bit of the results: a resumed
    run warms up anew. Where the step cannot be captured it goes on eagerly, and the reason is said once. So does a batch of
    another shape than the captured one.

    What the step ``reads`` may be changed between two steps. Where a graph cannot follow, as when a layer is frozen or a tensor is put
    in another's place, the step warms up anew; where that happens soon after three captures in a row, or a number
    changes in the step itself, it stays eager.

    Args:
        step: called with a batch and the latent vectors, as many as it makes updates of the discriminator, each drawn when it is
            asked for; returns scalars by name. While :attr:`guarded` it calls :meth:`guard` before each ``optimizer.step()``.
        optimizers: those it uses.
        device: where it runs.
        nonfinite: ``(name, loss, batch, latent, number)`` of a loss that is not finite to the exception to raise.
        recorder: makes the graph, as :class:`CUDARecorder`, or takes its place; None for eager steps.
        reads: returns the modules, the optimizers and other objects whose settings the step reads.

    Attributes:
        guarded: whether the step that runs must not wait for the device.
        fallback: why the steps are eager although there was a recorder.
    """

    def __init__(
        self,
        step: Callable[[Batch, Iterable[Tensor]], dict[str, Tensor]],
        optimizers: Iterable[Adam],
        device: torch.device,
        nonfinite: Callable[[str, float, Batch, Tensor, int], Exception],
        recorder: Any = None,
        reads: Callable[[], Iterable[Any]] = tuple,
    ):
        self._step, self._optimizers, self._device = step, list(optimizers), device
        self._nonfinite, self._recorder, self._reads = nonfinite, recorder, reads
        self.guarded, self.fallback = False, None
        self._calls, self._replays = 0, 0  # since the warming up began
        self._short = 0  # recordings in a row that were replayed less often than they were warmed up for
        self._settings: Settings | None = None  # of the captured step
        self._losses: list[tuple[str, Tensor]] = []  # of a guarded step, by the network whose they are
        self._figures: list[str] = []
        self._values: Tensor | None = None  # of the captured step: its losses, then its figures
        # Steps whose losses nobody has seen yet: a function that returns them, the batch, the latent vectors, the step's number.
        self._unseen: deque[tuple[Callable[[], list[float]], Batch, list[Tensor], int]] = deque()

    def __call__(self, batch: Batch, latents: Iterator[Tensor], number: int) -> dict[str, Tensor]:
        """The next step, whose ``number`` is for messages. Raises what ``nonfinite`` makes of a loss of this step or the last; of a
        replayed one at the next call, or by :meth:`check`."""
        self._calls += 1
        if self.captured and (changed := self._settings.change()) is not None:
            self._forget(changed)
        if self._recorder is None:
            return self._eager(batch, latents)
        if self._calls < WARM_UP:
            with self._recorder.warm_up():
                return self._eager(batch, latents)
        if self._calls == WARM_UP:
            return self._rehearse(batch, latents, number)
        latents = list(latents)
        if not self.captured:
            self._capture(batch, latents)
        inputs = _tensors(batch, latents)
        if not self.captured or [each.shape for each in inputs] != [each.shape for each in self._inputs]:
            return self._eager(batch, latents)
        for static, value in zip(self._inputs, inputs):
            static.copy_(value)
        self._recorder.replay()
        self._replays += 1
        for parameter, gradient in self._gradients:  # an eager step in between has put others there
            parameter.grad = gradient
        return self._result(self._values.clone(), batch, latents, number)

    @property
    def captured(self) -> bool:
        """Whether the step is in a graph by now."""
        return self._values is not None

    def guard(self, name: str, optimizer: Adam, loss: Tensor) -> None:
        """Leave out the next step of the optimizer, its state unchanged as well, if the ``loss`` is not finite: as the device
        finds, without the host."""
        self._losses.append((name, loss))
        # What a gradient scaler tells fused Adam. Infinity less itself is not 0 either; isfinite() takes twice the kernels.
        optimizer.found_inf = (loss - loss).ne(0).float()

    def check(self, but_last: int = 0) -> None:
        """Look at the losses of all steps made so far, or of those before the last. To be called before anything of the steps
        is kept.

        Raises:
            Exception: a loss was not finite.
        """
        while len(self._unseen) > but_last:
            losses, batch, latents, number = self._unseen.popleft()
            parts = batch.split(len(latents))
            for place, ((name, _), loss) in enumerate(zip(self._losses, losses())):
                if not math.isfinite(loss):
                    part = min(place, len(parts) - 1)  # the generator's loss is of the last one
                    raise self._nonfinite(name, loss, parts[part], latents[part], number)

    def _eager(self, batch: Batch, latents: Iterable[Tensor]) -> dict[str, Tensor]:
        self.check()
        return self._step(batch, latents)

    def _rehearse(self, batch: Batch, latents: Iterator[Tensor], number: int) -> dict[str, Tensor]:
        """The step as it will be captured, but eagerly, and watched."""
        taken: list[Tensor] = []
        drawn: set[str] = set()
        watched = _watched(latents, self._device, taken, drawn)
        before = Settings(self._reads)
        with self._recorder.rehearse() as waits, contextlib.closing(watched):
            values = self._guarded(batch, watched)
        changed = before.change_of_plain_values()
        result = self._result(values, batch, taken, number)
        if waits:
            self._give_up(f"the host waits for the device in {waits[0]}")
        elif "cpu" in drawn and not self._recorder.draws_on_cpu:
            self._give_up("random numbers are drawn on the CPU in the step")
        elif drawn and len(taken) > 1:
            # In a graph all latent vectors are drawn before these: another order, other numbers.
            self._give_up("random numbers are drawn between the updates of the discriminator")
        elif changed is not None:
            self._give_up(f"{changed} changes in a step")
        return result

    def _capture(self, batch: Batch, latents: list[Tensor]) -> None:
        self.check()
        static = Batch(*(None if each is None else each.clone() for each in batch)), [z.clone() for z in latents]
        try:
            with _capturable(self._optimizers) if self._device.type == "cuda" else contextlib.nullcontext():
                self._values = self._recorder.capture(lambda: self._guarded(*static), _tensors(*static))
        except RuntimeError as error:
            self.fallback = f"the capture failed: {str(error).partition(chr(10))[0]}"
            warnings.warn(without(self._recorder, self.fallback), RuntimeWarning, stacklevel=4)
            self._recorder = None
            return
        self._settings = Settings(self._reads)
        self._inputs = _tensors(*static)
        self._gradients = [
            (parameter, parameter.grad)
            for optimizer in self._optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        ]

    def _forget(self, changed: str) -> None:
        """Warm up anew, as what is ``changed`` is not what was captured."""
        self.check()
        self._recorder.forget()
        self._values, self._inputs, self._gradients, self._settings = None, [], [], None
        self._short = self._short + 1 if self._replays < WARM_UP else 0
        if self._short == 3:
            self._give_up(f"{changed} changes again and again")
        self._calls, self._replays = 1, 0

    def _guarded(self, batch: Batch, latents: Iterable[Tensor]) -> Tensor:
        """One step without the host's help. Returns its losses and figures, one vector."""
        self.guarded, self._losses = True, []
        try:
            figures = self._step(batch, latents)
        finally:
            self.guarded = False
            for optimizer in self._optimizers:
                vars(optimizer).pop("found_inf", None)
        self._figures = list(figures)
        return torch.stack([value.detach().float() for value in (*(loss for _, loss in self._losses), *figures.values())])

    def _result(self, values: Tensor, batch: Batch, latents: list[Tensor], number: int) -> dict[str, Tensor]:
        losses, figures = values[: len(self._losses)], values[len(self._losses) :]
        self._unseen.append((self._recorder.fetch(losses), batch, latents, number))
        # Only now, with this step started, so that the device has work while the host waits for the one before.
        self.check(but_last=self._recorder.behind)
        return dict(zip(self._figures, figures.unbind()))

    def _give_up(self, reason: str) -> None:
        say(without(self._recorder, reason))
        self._recorder, self.fallback = None, reason


def without(recorder: Any, reason: str) -> str:
    """The line that says why there is nothing to replay; ``recorder`` is one, or a class of them."""
    return f"the steps run without {recorder.name}: {reason}"


def _tensors(batch: Batch, latents: list[Tensor]) -> list[Tensor]:
    return [each for each in (*batch, *latents) if each is not None]


def _watched(latents: Iterator[Tensor], device: torch.device, taken: list[Tensor], drawn: set[str]) -> Iterator[Tensor]:
    """The latent vectors, which also go to ``taken``; to ``drawn`` go the devices on which random numbers were drawn between one
    and the next, or the end of the step."""
    for latent in latents:
        taken.append(latent)
        before = random_state(device)
        try:
            yield latent
        finally:
            after = random_state(device)
            drawn |= {name for name in before if before[name] is not None and not torch.equal(before[name], after[name])}


@contextlib.contextmanager
def _capturable(optimizers: Iterable[Adam]) -> Iterator[None]:
    """Inside, the optimizers agree to be captured; outside they would warn about it. Fused Adam computes the same."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group in groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group in groups:
            group["capturable"] = False
