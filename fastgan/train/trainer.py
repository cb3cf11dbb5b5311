"""The training loop that all model families share."""

import contextlib
import dataclasses
import functools
import math
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgan import _extension
from fastgan.data import Batch, ImageDataset
from fastgan.losses import fake_loss, generator_loss, gradient_penalty, r1_penalty, real_loss
from fastgan.nn import convert_sync_batch_norm, fuse
from fastgan.nn._runs import images_in_channels_last
from fastgan.nn.sync_batch_norm import own_statistics
from fastgan.ops._gradients import gradients_added_in_place
from fastgan.train.alarms import Alarms
from fastgan.train.allocator import keep_freed_memory
from fastgan.train.averaging import RampedAverage
from fastgan.train.board import Board, require_tensorboard
from fastgan.train.checkpoint import TrainingError, save_checkpoint
from fastgan.train.config import PRECISIONS, TrainConfig
from fastgan.train.distributed import Ranks, resume_words, set_random_state
from fastgan.train.graph import CUDARecorder, GraphedStep, adam, set_rate, without
from fastgan.train.nonfinite import locate_nonfinite, nonfinite_weight
from fastgan.train.outputs import (
    Claim, Metrics, Progress, claim_folder, copy_history, prepare_folder, save_animation, save_curves, save_grid, say, write_json,
)
from fastgan.train.recording import CPURecorder

# Curves and animation take seconds to draw: at most every so many seconds, and at the end.
DRAWING_INTERVAL = 60.0
# Networks with more weights are not recorded on the CPU: a step is some percent faster then, for the memory of gradients that are else
# added where they lie, or put off.
RECORDED_WEIGHTS = 4_000_000


class Objective:
    """What the two networks of a family minimise: the adversarial losses, unless a family says otherwise.

    Losses are scalars and come with figures for the log, detached scalars by name. ``d_real`` and ``d_fake`` are the mean
    probabilities D(x) and D(G(z)).

    Args:
        kind: of the generator's loss, as for :func:`fastgan.losses.generator_loss`; the discriminator's goes with it.
        augment: what real and generated images [N, C, H, W] go through before the discriminator; None for nothing.
        gradient_penalty: weight of :func:`fastgan.losses.gradient_penalty`, 0 for none.
        r1: weight of :func:`fastgan.losses.r1_penalty`, 0 for none.
        label_smoothing: as for :func:`fastgan.losses.discriminator_loss`.

    Attributes:
        averaged: the networks whose averaged weights are of use.
        no_graph: why a step with these losses cannot be captured in a CUDA graph, None where it can. In a graph Python decides
            nothing any more: what depends on ``progress`` would stay what it was in the captured step.
        no_recording: the same for a recording on the CPU. A number of your own in Python on which the losses depend, such as a counter
            for a term of every k-th step, would stand still in recorded steps: where it is an attribute of the objective or of a
            network the trainer sees it change and does not record; where it is elsewhere this has to be set.
    """

    averaged = ("generator",)
    no_graph: str | None = None
    no_recording: str | None = None
    _progress = 0.0
    _recorded = False  # whether a recording of the step is just being made

    def __init__(self, kind: str = "non_saturating", augment: Callable[[Tensor], Tensor] | None = None, *,
                 gradient_penalty: float = 0.0, r1: float = 0.0, label_smoothing: float = 0.0):
        self.kind = kind
        self.augment = augment or nn.Identity()
        self.gradient_penalty, self.r1, self.label_smoothing = gradient_penalty, r1, label_smoothing

    @property
    def progress(self) -> float:
        """The part of the run that is done, from 0 to 1; set by the trainer. A step that reads it is not recorded on the CPU."""
        if self._recorded:
            raise RuntimeError("the objective reads the progress of the run")
        return self._progress

    @progress.setter
    def progress(self, progress: float) -> None:
        self._progress = progress

    @property
    def discriminator_kind(self) -> str:
        """Of the discriminator's loss, as for :func:`fastgan.losses.real_loss`."""
        return "minimax" if self.kind == "non_saturating" else self.kind

    def discriminator_losses(
        self, discriminator: nn.Module, batch: Batch, fake: Tensor
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Terms of the loss of the ``discriminator`` over a real ``batch`` and as many ``fake`` images [N, C, H, W], which
        are detached from the generator.

        Each term is differentiated before the next is asked for: only one pass of the discriminator is held at a time.
        """
        kind = self.discriminator_kind
        real = self.augment(batch.images)
        logits = discriminator(real)
        yield real_loss(logits, kind, label_smoothing=self.label_smoothing), {"d_real": mean_probability(logits)}
        fake = self.augment(fake)
        logits = discriminator(fake)
        yield fake_loss(logits, kind), {"d_fake": mean_probability(logits)}
        if self.gradient_penalty:
            penalty = gradient_penalty(discriminator, real, fake, weight=self.gradient_penalty)
            yield penalty, {"gradient_penalty": penalty.detach()}
        if self.r1:
            penalty = r1_penalty(discriminator, real, weight=self.r1)
            yield penalty, {"r1": penalty.detach()}

    def generator_loss(self, discriminator: nn.Module, batch: Batch, fake: Tensor) -> tuple[Tensor, dict]:
        """Loss of the generator, whose images are ``fake`` [N, C, H, W]; the ``discriminator``'s weights take no gradients.
        ``batch`` holds the real images of the step."""
        return generator_loss(discriminator(self.augment(fake)), self.kind), {}

    def evaluate(self, trainer: "Trainer") -> dict[str, float]:
        """Figures of a ``trainer``'s networks for the log at the end of every epoch, such as a test error."""
        return {}


class Trainer:
    """One run: networks, optimizers, data position and output folder.

    In each process of a torch.distributed group it takes its share of every batch; the gradients are averaged, so that
    all hold the same weights, and the main process writes the results.

    Args:
        config: the settings.
        dataset: the training images.
        checkpoint: contents of a checkpoint to go on from, or None to start anew.

    Attributes:
        ranks: the processes of the run.
        step: updates of the generator done, each after ``discriminator_steps`` of the discriminator.
        graph: what runs the steps, from a CUDA graph or a recording where there can be one.
        averaged: exponential averages by name of the networks that the objective wants them of, where ``config.ema`` is not 0.
        program: what Python is to run with --resume to go on with the run: a script, or ``-m`` and a module.

    Raises:
        TrainingError: an output folder that cannot be written to, a checkpoint that does not fit.
        ValueError: settings the networks cannot be built with.
    """

    def __init__(self, config: TrainConfig, dataset: ImageDataset, checkpoint: dict[str, Any] | None = None):
        self.config = config
        self.ranks = Ranks()
        self.program = [sys.argv[0]]
        self.device = config.torch_device
        self.ranks.require_devices(self.device)
        if config.threads:
            torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        self.batches = config.batches(dataset)
        self.batches.divide(self.ranks.size, functools.partial(self.ranks.share, parts=self.batches.parts))
        self.fingerprint = dataset.fingerprint()
        self.ranks.require_same({"data set": self.fingerprint} | config.shared_settings())
        generator, discriminator, self.objective = config.build(dataset)
        if config.sync_batch_norm:
            generator, discriminator = map(convert_sync_batch_norm, (generator, discriminator))
        if config.fuse:
            generator, discriminator = fuse(generator, inplace=True), fuse(discriminator, inplace=True)
        # On a GPU convolutions work in channels_last: between them nothing is then reordered.
        layout = torch.channels_last if self.device.type == "cuda" else torch.preserve_format
        self.networks = {
            "generator": generator.to(self.device, memory_format=layout),
            "discriminator": discriminator.to(self.device, memory_format=layout),
        }
        self._frozen_discriminator = Frozen(discriminator)
        self._parameters = [parameter for network in self.networks.values() for parameter in network.parameters()]
        self.optimizers = {
            name: adam(network.parameters(), config.learning_rate, (config.beta1, config.beta2), self.device)
            for name, network in self.networks.items()
        }
        self.scalers = {
            name: torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16") for name in self.networks
        }
        self.averaged = {
            name: RampedAverage(self.networks[name], config.ema).requires_grad_(False)
            for name in self.objective.averaged
            if config.ema
        }
        self.graph = GraphedStep(
            self._update, self.optimizers.values(), self.device, self._nonfinite, self._graph_recorder(),
            reads=lambda: [*self.networks.values(), *self.optimizers.values(), self.objective],
        )
        self.alarms = Alarms(config.generator_loss, config.side_by_side)
        self.step = 0
        self._signals: list[int] = []  # that ask this process to stop
        self._stopping = False  # whether any process was asked to
        # From a generator of its own and on the CPU: the same noise before and after a resume, and on any device.
        noise = config.latent(math.prod(config.grid), torch.Generator().manual_seed(config.seed))
        self.grid_noise = noise.to(self.device)
        if checkpoint:
            self._restore(checkpoint)
        self.ranks.start_alike(self.networks.values())
        self.output = Path(config.output)
        self._claim: Claim | None = None  # on the output folder, up to the end of train()
        self.ranks.on_main(lambda: self._prepare_output(anew=checkpoint is None))

    @property
    def planned_steps(self) -> int:
        """Updates in all epochs, over which what changes in the course of a run does so: also of one that ``max_steps`` stops."""
        return self.config.epochs * len(self.batches)

    @property
    def total_steps(self) -> int:
        """Updates of the whole run."""
        return min(self.planned_steps, self.config.max_steps or self.planned_steps)

    def train(self) -> None:
        """Train up to the last step. SIGINT, SIGTERM and SIGHUP end the run after the current step, with a checkpoint; of many
        processes all end when one of them is asked to.

        Raises:
            TrainingError: a loss that is not finite, or an output that cannot be written; the last
                checkpoint is intact.
            KeyboardInterrupt, SystemExit: the run was interrupted before its last step, and saved.
        """
        self.ranks.on_main(self._claim_output)  # anew, where this goes on after an interrupt
        try:
            with deferred_signals() as self._signals:
                self._train()
        finally:
            self._claim = None
        # One that came later than that has cut nothing short.
        if self.step < self.total_steps and (self._signals or self._stopping):
            if self.ranks.main:
                say(f"stopped at step {self.step} of {self.total_steps} and saved; to go on:\n  {self._resume_command()}")
            number = self._signals[0] if self._signals else signal.SIGTERM
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(128 + number)

    def _train(self) -> None:
        if self.device.type == "cpu":
            keep_freed_memory()
        steps_per_epoch = len(self.batches)
        checkpoint_every = self.config.checkpoint_every or steps_per_epoch
        progress = Progress(self.step, self.total_steps, hidden=not self.ranks.main)
        drawn = time.monotonic()
        timed_images, seconds = 0, 0.0
        with contextlib.closing(progress):
            for epoch, batch in self._remaining_batches():
                started = time.monotonic()
                figures = self.train_step(batch)
                seconds += time.monotonic() - started
                timed_images += len(batch.images) * self.ranks.size
                self.step += 1
                progress.advance()
                run_ends = self.step == self.total_steps or self._stopping
                epoch_ends = self.step % steps_per_epoch == 0
                # The figures that alarms collect are those of a run that does not stop here: a resumed one raises the same.
                watched = epoch_ends or self.step % self.config.log_every == 0
                logged = run_ends or watched
                if logged:
                    self.graph.check()
                    figures = self.ranks.mean(figures)
                if not self.ranks.main:
                    if run_ends:
                        break
                    continue
                if logged:
                    record = {"step": self.step, "epoch": epoch + 1}
                    record |= {name: float(figure) for name, figure in figures.items()}
                    with own_statistics():
                        record |= self.objective.evaluate(self) if epoch_ends else {}
                    record["images_per_second"] = round(timed_images / seconds, 1)
                    timed_images, seconds = 0, 0.0
                    self.metrics.append(record)
                    progress.show(record, always=run_ends or epoch_ends)
                    if watched:
                        scale = self.scalers["generator"].get_scale()
                        self._raise(self.alarms.logged(self.step, record, self.networks["generator"], scale))
                    if self.board:
                        self.board.log(record)
                if run_ends or epoch_ends:
                    path = self.output / "samples" / f"epoch_{epoch + 1:04d}.png"
                    samples = self.samples(self.grid_noise)
                    save_grid(path, samples, self.config.grid[1])
                    self._raise(self.alarms.drawn(self.step, samples, batch.images))
                    if self.board:
                        self.board.draw(path, self.step)
                if run_ends or self.step % checkpoint_every == 0:
                    self.save()
                if epoch_ends and self.config.keeps_checkpoint(epoch + 1):
                    self.save(self.output / "checkpoints" / f"epoch_{epoch + 1:04d}.pt")
                if run_ends or epoch_ends and time.monotonic() - drawn > DRAWING_INTERVAL:
                    self._draw()
                    drawn = time.monotonic()
                if run_ends:
                    break
            # No process leaves before the results are written: torchrun would end the others.
            self.ranks.wait()

    def _remaining_batches(self) -> Iterator[tuple[int, Batch]]:
        """The epoch's number from 0 and the batch, from the current step to the last."""
        while self.step < self.total_steps:
            epoch, position = divmod(self.step, len(self.batches))
            for batch in self.batches.epoch(epoch, position):
                yield epoch, batch

    def train_step(self, batch: Batch) -> dict[str, Tensor]:
        """One update of the generator, and ``discriminator_steps`` of the discriminator before it (Goodfellow et al.
        2014, algorithm 1, where their number is k).

        Args:
            batch: images [N, C, H, W] in [-1, 1], labels [N] or None; cut into a part for each update.

        Returns:
            Figures for the log: ``loss_d``, ``loss_g`` and the objective's own.
        """
        self.objective.progress = self.step / self.planned_steps
        self._set_learning_rates()
        self._stopping = bool(self._signals)  # a replayed step does not ask
        latents = (self._latent(len(part.images)) for part in batch.split(self.config.discriminator_steps))
        figures = self.graph(batch, latents, self.step + 1)
        for name, averaged in self.averaged.items():
            averaged.update_parameters(self.networks[name])
        return figures

    def _update(self, batch: Batch, latents: Iterable[Tensor]) -> dict[str, Tensor]:
        """What the device does in a step, which a CUDA graph may hold. ``latents`` are drawn when they are asked for."""
        generator, discriminator = self.networks.values()

        # Discriminator: real images against fakes that carry no gradient back to the generator.
        for part, z in zip(batch.split(self.config.discriminator_steps), latents):
            with self.autocast(), images_in_channels_last():
                fake = generator(z)
            losses = self.objective.discriminator_losses(discriminator, part, fake.detach())
            loss_d, figures_d = self._descend("discriminator", losses, part, z)

        # Generator: the same fakes, judged by the discriminator as it now is and as it stays.
        with self._frozen_discriminator:
            losses = (self.objective.generator_loss(discriminator, part, fake) for _ in range(1))  # once there is room for it
            loss_g, figures_g = self._descend("generator", losses, part, z)
        return {"loss_d": loss_d, "loss_g": loss_g} | figures_d | figures_g

    def _graph_recorder(self) -> CUDARecorder | CPURecorder | None:
        """What captures the step, where it can be; says why not where a CUDA graph was asked for."""
        if self.device.type == "cpu":
            weights = sum(parameter.numel() for parameter in self._parameters)
            possible = _extension.has_kernels("cpu") and self.ranks.group is None
            wanted = self.config.cpu_graph and self.objective.no_recording is None and weights <= RECORDED_WEIGHTS
            return CPURecorder(self._parameters, self) if possible and wanted else None
        if self.device.type != "cuda" or not self.config.cuda_graph:
            return None
        reason = self.objective.no_graph
        if self.ranks.group is not None:
            reason = "the processes tell each other in every step whether to stop"
        elif self.config.precision == "fp16":
            reason = "the scale of fp16's gradients is decided by the host in every step"
        if reason is None:
            return CUDARecorder()
        if self.ranks.main:
            say(without(CUDARecorder, reason))
        return None

    def _set_learning_rates(self) -> None:
        rate = self.config.learning_rate_at(self.objective.progress)
        own = self.config.discriminator_learning_rate
        ratio = own / self.config.learning_rate if own is not None else 1.0
        set_rate(self.optimizers["generator"], rate)
        set_rate(self.optimizers["discriminator"], rate * ratio)

    def _latent(self, count: int) -> Tensor:
        """Inputs of the generator for ``count`` images: this process's share of those of a whole batch."""
        whole = self.ranks.draw(lambda: self.config.latent(count * self.ranks.size), self.device)
        return self.ranks.share(whole, self.batches.parts // self.config.discriminator_steps)

    def _descend(
        self, name: str, losses: Iterator[tuple[Tensor, dict[str, Tensor]]], batch: Batch, z: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One optimizer step of a network on the sum of ``losses``, unless it is not finite: then the run ends here.
        Returns the mean loss of the processes and the figures."""
        optimizer, scaler = self.optimizers[name], self.scalers[name]
        # Both networks', as the other's have done their work: less memory. An optimizer's zero_grad() takes as long as a small layer.
        for parameter in self._parameters:
            parameter.grad = None
        loss, figures = torch.zeros((), device=self.device), {}
        with gradients_added_in_place(put_off=name == "discriminator"):  # whose loss comes in several terms
            while (term := self._next_term(losses)) is not None:
                scaler.scale(term[0]).backward()
                loss, figures = loss + term[0].detach(), figures | term[1]
                del term  # and with it what its backward pass kept
        parameters = self.networks[name].parameters()
        mean_loss, self._stopping = self.ranks.average(parameters, loss, bool(self._signals))
        if self.graph.guarded:
            self.graph.guard(name, optimizer, mean_loss)
        elif not math.isfinite(mean_loss.item()):
            raise self._nonfinite(name, loss.item(), batch, z, self.step + 1)
        scaler.step(optimizer)
        scaler.update()
        return mean_loss, figures

    def _next_term(self, losses: Iterator[tuple[Tensor, dict[str, Tensor]]]) -> tuple[Tensor, dict[str, Tensor]] | None:
        with self.autocast():
            return next(losses, None)

    def _nonfinite(self, name: str, loss: float, batch: Batch, z: Tensor, step: int) -> TrainingError:
        """Says where the first value arose that is not finite, in the first process that has one."""
        culprit = None
        if not math.isfinite(loss):
            with self.autocast(), own_statistics():
                culprit = locate_nonfinite(*self.networks.values(), batch.images, z)
        found = [(rank, *cause) for rank, cause in enumerate(self.ranks.gather((loss, culprit))) if cause[1]]
        rank, loss, culprit = found[0]
        where = f" in process {rank}" if self.ranks.group is not None else ""
        return TrainingError(
            f"step {step}: the loss of the {name} is {loss}{where}; first value that is not finite: "
            f"{culprit}. The checkpoint in {self.output} is from before it; a lower --learning-rate often helps"
        )

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context in which the networks run at the precision of the settings."""
        precision = PRECISIONS[self.config.precision]
        if precision == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, precision)

    @torch.no_grad()
    def samples(self, z: Tensor) -> Tensor:
        """Images [N, C, H, W] in [-1, 1] from noise z, by the averaged weights where there are any.

        In eval mode: an image then does not depend on the others of its batch.
        """
        generator = self.averaged.get("generator", self.networks["generator"])
        generator.eval()
        with self.autocast():
            images = generator(z)
        generator.train()
        return images.float()

    def save(self, path: Path | None = None) -> None:
        """Write checkpoint.pt, or another file at ``path``. Raises TrainingError, with the previous checkpoint intact: also for
        weights that are not finite, of which the step's loss, from before its update, tells nothing."""
        self.graph.check()
        for name, network in self.networks.items():
            if where := nonfinite_weight(network):
                raise TrainingError(
                    f"step {self.step}: not finite: {name}, {where}. The checkpoint in {self.output} stays as it was; a lower "
                    "--learning-rate often helps"
                )
        path = path or self.output / "checkpoint.pt"
        epoch, position = divmod(self.step, len(self.batches))
        state = {
            "family": self.config.family,
            "config": dataclasses.asdict(self.config),
            "step": self.step,
            "data": {"epoch": epoch, "position": position, "fingerprint": self.fingerprint},
            "random": self.ranks.random_state(self.device),
            "alarms": self.alarms.state_dict(),
        }
        save_checkpoint(path, state | {
            part: {name: item.state_dict() for name, item in getattr(self, part).items()} for part in _STATEFUL
        })

    def _restore(self, state: dict[str, Any]) -> None:
        if state["data"]["fingerprint"] != self.fingerprint:
            raise TrainingError("the checkpoint was trained on other images than those found now")
        try:
            for part in _STATEFUL:
                for name, item in getattr(self, part).items():
                    item.load_state_dict(state[part][name])
        except (KeyError, RuntimeError, ValueError) as error:
            raise TrainingError(f"the checkpoint does not fit these networks: {error}") from error
        if "alarms" in state:
            self.alarms.load_state_dict(state["alarms"])
        set_random_state(state["random"], self.device)
        self.step = state["step"]

    def _prepare_output(self, anew: bool) -> None:
        if self.config.tensorboard:
            require_tensorboard()
        self._claim_output()
        if anew:
            prepare_folder(self.output)
        elif Path(self.config.resume).resolve() != self.output.resolve():
            prepare_folder(self.output)
            copy_history(Path(self.config.resume), self.output)
        write_json(self.output / "config.json", {"family": self.config.family} | dataclasses.asdict(self.config))
        try:
            (self.output / "samples").mkdir(exist_ok=True)
            if self.config.keep_checkpoints:
                (self.output / "checkpoints").mkdir(exist_ok=True)
            self.metrics = Metrics(self.output / "metrics.jsonl", self.step)
            self.alarm_log = Metrics(self.output / "alarms.jsonl", self.step)
        except OSError as error:
            raise TrainingError(f"{error.filename or self.output} cannot be written: {error.strerror or error}") from error
        self.board = Board(self.output, self.step) if self.config.tensorboard else None
        # So that a run killed before its first checkpoint can be resumed too, and a folder that is too
        # small for a checkpoint is found out before an hour of training.
        self.save()

    def _claim_output(self) -> None:
        self._claim = claim_folder(self.output)

    def _raise(self, alarms: Iterable[dict]) -> None:
        for alarm in alarms:
            self.alarm_log.append(alarm)
            say(f"alarm at step {alarm['step']}: {alarm['message']}")

    def _draw(self) -> None:
        save_curves(self.output / "losses.png", self.metrics.read())
        save_animation(self.output / "samples.gif", sorted((self.output / "samples").glob("epoch_*.png")))

    def _resume_command(self) -> str:
        return shlex.join([*resume_words(), *self.program, "--resume", str(self.output)])


def mean_probability(logits: Tensor) -> Tensor:
    """Mean of D over a batch, from its logits."""
    return logits.detach().float().sigmoid().mean()


_STATEFUL = ("networks", "optimizers", "scalers", "averaged")


class Frozen:
    """Inside ``with``, a network passes gradients on but none are computed for its weights; its buffers (running statistics) are at
    the end what they were before. Made once for many steps: finding its parts takes as long as a small layer.
    """

    def __init__(self, network: nn.Module):
        self.parameters, self.buffers = list(network.parameters()), list(network.buffers())

    def __enter__(self) -> None:
        self._before = [buffer.clone() for buffer in self.buffers]
        self._trained = [parameter for parameter in self.parameters if parameter.requires_grad]
        for parameter in self._trained:
            parameter.requires_grad_(False)

    def __exit__(self, *error: Any) -> None:
        for parameter in self._trained:
            parameter.requires_grad_(True)
        for buffer, before in zip(self.buffers, self._before):
            buffer.copy_(before)
        self._before = []


@contextlib.contextmanager
def deferred_signals() -> Iterator[list[int]]:
    """Collect the first SIGINT, SIGTERM or SIGHUP instead of acting on it, so that a step is never left half done;
    a second one acts at once. A SIGHUP that is ignored, as under nohup, or has a handler is left alone.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        # Only the main thread can take signals.
        yield received
        return

    def note(number: int, frame: Any) -> None:
        received.append(number)
        for each, handler in previous.items():
            signal.signal(each, handler)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        numbers.append(signal.SIGHUP)
    previous = {number: signal.signal(number, note) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
