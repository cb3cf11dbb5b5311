"""Settings of a training run as a dataclass, and the command line made from it."""

import argparse
import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from fastgan._arguments import MOST_THREADS
from fastgan.data import DATASETS, Batches, ImageDataset, load_dataset
from fastgan.losses import GENERATOR_LOSSES

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_FOLDERS = ("data_root", "output", "resume")


def option(default: Any, help: str, *, choices: tuple | None = None, minimum: float | None = None,
           below: float | None = None, may_change: bool = False) -> Any:
    """A setting with its help text and limits.

    Args:
        default: its value where none is given.
        help: what it is, in a few words, for ``--help`` and the reference.
        choices: the values allowed; None for any.
        minimum: the least value allowed.
        below: what the value must be below.
        may_change: whether a resumed run may set it anew: everything else decides the numbers it computes.

    Returns:
        A field of a dataclass.
    """
    metadata = {"help": help, "choices": choices, "minimum": minimum, "below": below, "may_change": may_change}
    return dataclasses.field(default=default, metadata=metadata)


def check_limits(config: Any) -> None:
    """Raises a ValueError that names the first setting outside the choices or limits of its :func:`option`, or an empty output."""
    for field in dataclasses.fields(config):
        value, limits = getattr(config, field.name), field.metadata
        flag = f"--{field.name.replace('_', '-')}"
        if value is None and field.default is None:
            continue
        if limits["choices"] and value not in limits["choices"]:
            raise ValueError(f"{flag} must be one of {', '.join(map(str, limits['choices']))}, got {value}")
        if limits["minimum"] is not None and not value >= limits["minimum"]:
            raise ValueError(f"{flag} must be at least {limits['minimum']}, got {value}")
        # What is computed from larger ones overflows PyTorch's integers.
        below = 2**48 if limits["below"] is None and isinstance(value, int) else limits["below"]
        if below is not None and not value < below:
            raise ValueError(f"{flag} must be below {below}, got {value}")
    if not config.output:  # as of a shell's variable that is not set
        raise ValueError("--output must be a folder, got an empty path")


@dataclasses.dataclass(kw_only=True)
class TrainConfig:
    """What all examples share. A model family adds its own settings and says how its networks are built.

    The defaults make the most of a few minutes on a CPU; the DCGAN paper's own, for large sets, are batches of
    128 and a learning rate of 2e-4.

    Raises:
        ValueError: a setting outside its choices or limits.
    """

    family: ClassVar[str]
    # Rows and columns of the grid of samples.
    grid: ClassVar[tuple[int, int]] = (8, 8)
    # Updates of the discriminator in a step, each on a batch of its own.
    discriminator_steps: ClassVar[int] = 1
    # Of the generator's inputs: "normal", N(0, 1), or "uniform", U(-1, 1).
    latent_distribution: ClassVar[str] = "normal"
    # Independent networks held in one, each for an equal part of a batch.
    side_by_side: ClassVar[int] = 1

    dataset: str = option("digits", "data set", choices=DATASETS)
    data_root: str | None = option(None, "folder of the data files, or of the images for 'folder'", may_change=True)
    image_size: int = option(32, "height and width of the images in pixels", minimum=1)
    channels: int | None = option(None, "1 for grey, 3 for RGB; default: as the data set", choices=(1, 3))
    epochs: int = option(10, "passes over the training images", minimum=1, may_change=True)
    max_steps: int | None = option(None, "stop after this many steps, counted from the start of the run",
                                   minimum=1, may_change=True)
    batch_size: int = option(32, "images in a batch", minimum=1)
    latent_dim: int = option(100, "length of the generator's input", minimum=1)
    learning_rate: float = option(5e-4, "Adam's learning rate for both networks", minimum=0)
    discriminator_learning_rate: float | None = option(
        None, "a different Adam learning rate for the discriminator (two time scales, Heusel et al. 2017)",
        minimum=0)
    beta1: float = option(0.5, "Adam's decay of the mean gradient", minimum=0, below=1)
    beta2: float = option(0.999, "Adam's decay of the mean squared gradient", minimum=0, below=1)
    generator_loss: str = option("non_saturating", "adversarial loss; sets the matching discriminator loss too",
                                 choices=GENERATOR_LOSSES)
    ema: float = option(0.995, "decay of the averaged weights used for sampling; 0 turns averaging off",
                        minimum=0, below=1)
    device: str = option("auto", "where to train; auto uses a GPU if there is one",
                         choices=("auto", "cpu", "cuda"), may_change=True)
    precision: str = option("fp32", "arithmetic of the networks, by autocast", choices=tuple(PRECISIONS))
    sync_batch_norm: bool = option(False, "batch norm over the images of all processes of a run, not of each alone")
    fuse: bool = option(True, "run the networks on fastgan's fused ops")
    cuda_graph: bool = option(True, "on a GPU, capture the training step in a CUDA graph; if that is impossible, the run says why",
                              may_change=True)
    cpu_graph: bool = option(True, "on the CPU, record the training step of networks of up to 4 million weights and replay it "
                             "without Python", may_change=True)
    threads: int | None = option(None, "CPU threads; default: PyTorch's choice", minimum=1, below=MOST_THREADS + 1, may_change=True)
    seed: int = option(0, "random seed for weights, noise and image order", minimum=0, below=2**32)
    log_every: int = option(10, "steps between two lines of metrics.jsonl", minimum=1, may_change=True)
    checkpoint_every: int | None = option(None, "steps between two checkpoints; default: an epoch",
                                          minimum=1, may_change=True)
    keep_checkpoints: str | None = option(None, "comma-separated epochs whose checkpoints are kept in "
                                          "checkpoints/, or 'all'", may_change=True)
    tensorboard: bool = option(False, "also write TensorBoard files, into the folder tensorboard of --output",
                               may_change=True)
    output: str = option("runs/train", "folder the results are written to", may_change=True)
    resume: str | None = option(None, "folder of a run to continue, or its checkpoint.pt, with that run's settings", may_change=True)

    def __post_init__(self):
        check_limits(self)
        if self.discriminator_learning_rate is not None and self.learning_rate == 0:
            raise ValueError("--learning-rate must be above 0 with --discriminator-learning-rate, got 0")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: this PyTorch sees no GPU; use --device cpu")
        if self.precision == "fp16" and self.torch_device.type == "cpu":
            raise ValueError("--precision fp16 needs a GPU; on a CPU use bf16")
        kept = self.keep_checkpoints
        if kept not in (None, "all") and not all(epoch.isdecimal() and int(epoch) for epoch in kept.split(",")):
            raise ValueError(f"--keep-checkpoints must be 'all' or epochs with commas between, such as 1,3,5, got {kept!r}")

    @property
    def torch_device(self) -> torch.device:
        """Where to train, with ``auto`` decided."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)

    def keeps_checkpoint(self, epoch: int) -> bool:
        """Whether the checkpoint after this epoch, counted from 1, is kept for good."""
        kept = self.keep_checkpoints
        return kept == "all" or kept is not None and epoch in map(int, kept.split(","))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the images."""
        return self.channels or (3 if self.dataset == "folder" else 1), self.image_size, self.image_size

    def image_shape_of(self, dataset: ImageDataset) -> tuple[int, int, int]:
        """(channels, height, width) of the images of a ``dataset``, which must be that of the settings: a checkpoint's settings
        describe its networks.

        Raises:
            ValueError: it is another one.
        """
        if dataset.image_shape != self.image_shape:
            raise ValueError(
                f"dataset must have images of shape {list(self.image_shape)}, as image_size and channels say, "
                f"got {list(dataset.image_shape)}"
            )
        return self.image_shape

    def latent(self, count: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """``count`` inputs of the generator network, [count, latent_dim] from N(0, 1).

        Drawn on the device, or on the device of ``generator`` where one is given.
        """
        device = self.torch_device if generator is None else generator.device
        return torch.randn(count, self.latent_dim, device=device, generator=generator)

    def load_data(self) -> ImageDataset:
        """The training images."""
        return load_dataset(self.dataset, self.data_root, image_size=self.image_size, channels=self.channels)

    def learning_rate_at(self, progress: float) -> float:
        """Adam's step size when a part of the run is done: ``progress`` from 0 to 1. Another one of the discriminator's
        falls in proportion."""
        return self.learning_rate

    def batches(self, dataset: ImageDataset) -> Batches:
        """The training batches of the ``dataset``, on the device."""
        steps = self.discriminator_steps
        return Batches(dataset, self.batch_size * steps, self.seed, self.torch_device, parts=steps)

    def shared_settings(self) -> dict[str, Any]:
        """The settings by their flags that all processes of a run must have alike."""
        own = ("data_root", "threads", "output", "resume")
        return {
            f"--{name.replace('_', '-')}": value for name, value in dataclasses.asdict(self).items() if name not in own
        }

    def build(self, dataset: ImageDataset) -> tuple[nn.Module, nn.Module, Any]:
        """The generator, the discriminator and the :class:`~fastgan.train.Objective` for a ``dataset``."""
        raise NotImplementedError

    def build_generator(self) -> nn.Module:
        """The generator alone, for which the images need not be there."""
        raise NotImplementedError


@dataclasses.dataclass(kw_only=True)
class AdversarialConfig(TrainConfig):
    """What the families with a real-or-generated discriminator share: the terms beside its loss.

    Raises:
        ValueError: label smoothing with a loss that has no labels.
    """

    gradient_penalty: float = option(0.0, "weight of WGAN-GP's gradient penalty (the paper: 10, with wasserstein)",
                                     minimum=0)
    r1: float = option(0.0, "weight of R1, the penalty on the discriminator's gradient at real images", minimum=0)
    label_smoothing: float = option(0.0, "one-sided label smoothing: real images get the label 1 minus this (usual: 0.1); for "
                                    "non_saturating and minimax",
                                    minimum=0, below=1)

    def __post_init__(self):
        super().__post_init__()
        if self.label_smoothing and self.generator_loss not in ("non_saturating", "minimax"):
            raise ValueError(
                f"--label-smoothing must be 0 with --generator-loss {self.generator_loss}, which has no labels, "
                f"got {self.label_smoothing}"
            )

    @property
    def discriminator_terms(self) -> dict[str, float]:
        """The terms by their names in :class:`~fastgan.train.trainer.Objective`."""
        return {
            "gradient_penalty": self.gradient_penalty, "r1": self.r1, "label_smoothing": self.label_smoothing,
        }


class LinearDecay:
    """For settings with ``decay``, the final fraction (0 to 1) of the run over which the learning rate falls linearly to 0."""

    decay: float

    def __post_init__(self):
        super().__post_init__()
        if self.decay > 1:
            raise ValueError(f"--decay must be at most 1, got {self.decay}")

    def learning_rate_at(self, progress: float) -> float:
        """As :meth:`TrainConfig.learning_rate_at`."""
        return self.learning_rate * (min(1.0, (1 - progress) / self.decay) if self.decay else 1.0)


def parse_arguments(config_class: type[TrainConfig], arguments: list[str] | None = None) -> dict[str, Any]:
    """The settings given on the command line, and only those."""
    parser = argparse.ArgumentParser(description=config_class.__doc__.splitlines()[0])
    add_options(parser, config_class)
    return vars(parser.parse_args(arguments))


def add_options(parser: argparse.ArgumentParser, config_class: type[TrainConfig]) -> None:
    """Make a flag of every setting: first those of the family, then those that all share. What is not given on the
    command line is not in the namespace.
    """
    shared = {field.name for field in dataclasses.fields(TrainConfig)}
    groups = {
        False: parser.add_argument_group(f"settings of this model family ({config_class.family})"),
        True: parser.add_argument_group("settings of every model family"),
    }
    kinds = typing.get_type_hints(config_class)
    for field in sorted(dataclasses.fields(config_class), key=lambda field: field.name in shared):
        flag, help = f"--{field.name.replace('_', '-')}", field.metadata["help"]
        if field.default is not None:
            help += f" (default: {field.default})"
        kind = kinds[field.name]
        if isinstance(kind, types.UnionType):
            kind = next(part for part in kind.__args__ if part is not type(None))
        if kind is bool:
            details = {"action": argparse.BooleanOptionalAction}
        else:
            metavar = field.name.upper() if kind is str else kind.__name__.upper()
            details = {"type": kind, "choices": field.metadata["choices"],
                       "metavar": None if field.metadata["choices"] else "DIR" if field.name in _FOLDERS else metavar}
        groups[field.name in shared].add_argument(flag, help=help, default=argparse.SUPPRESS, **details)


def resumed_checkpoint(given: dict[str, Any]) -> Path | None:
    """The checkpoint of the run that the settings ``given`` go on with, None where they start a new one.

    Raises:
        ValueError: an empty path, as of a shell's variable that is not set.
    """
    if given.get("resume") is None:
        return None
    if not given["resume"]:
        raise ValueError("--resume must be the folder of a run, got an empty path")
    return _run_folder(given["resume"]) / "checkpoint.pt"


def _run_folder(resume: str) -> Path:
    path = Path(resume)
    return path.parent if path.name == "checkpoint.pt" and not path.is_dir() else path


def resumed_config(
    config_class: type[TrainConfig], given: dict[str, Any], saved: dict[str, Any], step: int
) -> TrainConfig:
    """The settings of a checkpoint with those given anew put over them.

    A limit of steps that the checkpoint already reached no longer holds.

    Raises:
        ValueError: a setting given that differs from the checkpoint's and may not change.
    """
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    kept = {name: value for name, value in saved.items() if name in fields}
    if (kept.get("max_steps") or 0) <= step:
        kept["max_steps"] = None
    folder = str(_run_folder(given["resume"]))
    config = config_class(**{**kept, "output": folder, **given, "resume": folder})
    differing = [
        f"--{name.replace('_', '-')} is {saved[name]} in the checkpoint, {value} was asked for"
        for name, value in given.items()
        if name in saved and not fields[name].metadata["may_change"] and not _same(config, name, saved[name])
    ]
    if differing:
        raise ValueError(f"the checkpoint is of another configuration: {'; '.join(differing)}")
    return config


def _same(config: Any, name: str, saved: Any) -> bool:
    """Whether a setting means what it did when it was ``saved``: no number of channels stands for the data set's."""
    if name == "channels" and saved is None:
        return config.image_shape == dataclasses.replace(config, channels=None).image_shape
    return getattr(config, name) == saved
