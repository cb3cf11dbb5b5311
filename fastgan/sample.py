"""Images from a trained generator, and `fastgan sample`, which draws a grid of them."""

import argparse
import dataclasses
import math
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgan.laboratory.experiment import LaboratoryConfig, generate, load_generator as load_laboratory
from fastgan.laboratory.pictures import save_samples, save_walk
from fastgan.nn import fuse
from fastgan.train.checkpoint import TrainingError, load_checkpoint
from fastgan.train.config import TrainConfig
from fastgan.train.families import FAMILIES
from fastgan.train.outputs import save_grid

# Samples of a one-dimensional generator in one panel.
PANEL_SAMPLES = 2000


def load_generator(path: str | os.PathLike, family: str | None = None) -> tuple[TrainConfig, nn.Module]:
    """The generator of a checkpoint, as plain layers in eval mode, by its averaged weights where it has them.

    Args:
        path: the checkpoint, or the folder of its run. The training images need not be there.
        family: the model family it must be of; None for any that generates images.

    Returns:
        The run's settings (with the CPU as device) and the generator.

    Raises:
        TrainingError: no checkpoint, or one of another family.
    """
    return _generator_of(_read(path, family), path)


def walk(start: Tensor, end: Tensor, count: int, distribution: str) -> Tensor:
    """Points from one latent vector to another.

    Args:
        start, end: [N, latent_dim].
        count: points of a walk, both ends included.
        distribution: of the latent vectors: ``"uniform"`` for a straight walk, ``"normal"`` for one along a sphere,
            since a straight one comes nearer to 0 than nearly all vectors from N(0, 1) are (White 2016, arXiv
            1609.04468).

    Returns:
        [N, count, latent_dim].
    """
    part = torch.linspace(0, 1, count)[None, :, None]
    start, end = start[:, None], end[:, None]
    if distribution == "uniform":
        return torch.lerp(start, end, part)
    angle = torch.cosine_similarity(start, end, -1).clamp(-1 + 1e-6, 1 - 1e-6).acos()[..., None]
    return (((1 - part) * angle).sin() * start + (part * angle).sin() * end) / angle.sin()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="a run's folder, or its checkpoint.pt")
    parser.add_argument("--grid", type=_grid, metavar="ROWSxCOLUMNS", help="such as 8x8; default: the grid of the run")
    parser.add_argument("--interpolate", action="store_true",
                        help="each row interpolates between two latent points, instead of independent samples")
    parser.add_argument("--seed", type=_seed, default=0, metavar="INT", help="of the latent points (default: 0)")
    parser.add_argument("--out", type=_picture, default=Path("grid.png"), metavar="FILE",
                        help="PNG file to write (default: grid.png)")  # fmt: skip


def run(options: argparse.Namespace) -> int:
    state = _read(options.checkpoint)
    draw = _draw_panels if state["family"] == LaboratoryConfig.family else _draw_images
    print(draw(state, options))
    return 0


@torch.no_grad()
def _draw_images(state: dict[str, Any], options: argparse.Namespace) -> str:
    config, generator = _generator_of(state, options.checkpoint)
    rows, columns = options.grid or config.grid
    networks = config.side_by_side
    if rows % networks:
        raise TrainingError(
            f"--grid {rows}x{columns}: the checkpoint holds {networks} networks side by side, each fills rows of its "
            f"own; the number of rows must be a multiple of {networks}"
        )
    random = torch.Generator().manual_seed(options.seed)
    if options.interpolate:
        z = walk(config.latent(rows, random), config.latent(rows, random), columns, config.latent_distribution).flatten(0, 1)
    else:
        z = config.latent(rows * columns, random)
    save_grid(options.out, fuse(generator, inplace=True)(z), columns)
    weights = "averaged weights" if config.ema else "weights"
    return f"{options.out}: {rows} x {columns} images by the {weights} of step {state['step']} of {options.checkpoint}"


def _draw_panels(state: dict[str, Any], options: argparse.Namespace) -> str:
    """The laboratory's generators make numbers: a panel for each of its networks."""
    config, generator = load_laboratory(state)
    columns = min(5, config.seeds)
    rows, columns = options.grid or (math.ceil(config.seeds / columns), columns)
    count = min(rows * columns, config.seeds)
    if options.interpolate:
        z = torch.linspace(-config.noise_range, config.noise_range, PANEL_SAMPLES)
        samples = generate(config, generator, z.expand(config.seeds, -1))
        save_walk(options.out, config.data, z, samples[:count], columns)
    else:
        random = torch.Generator().manual_seed(options.seed)
        z = torch.empty(config.seeds, PANEL_SAMPLES).uniform_(-config.noise_range, config.noise_range, generator=random)
        save_samples(options.out, config.data, generate(config, generator, z)[:count], columns)
    what = "outputs over the input" if options.interpolate else f"histograms of {PANEL_SAMPLES} samples each"
    return f"{options.out}: {what} of {count} networks of {options.checkpoint}"


def _read(path: str | os.PathLike, family: str | None = None) -> dict[str, Any]:
    path = Path(path)
    return load_checkpoint(path / "checkpoint.pt" if path.is_dir() else path, family)


def _generator_of(state: dict[str, Any], path: str | os.PathLike) -> tuple[TrainConfig, nn.Module]:
    family = state["family"]
    if family not in FAMILIES:
        raise TrainingError(f"{path}: family {family!r} has no generator of images; {', '.join(FAMILIES)} have")
    known = {field.name for field in dataclasses.fields(FAMILIES[family])}
    settings = {name: value for name, value in state["config"].items() if name in known}
    config = FAMILIES[family](**settings | {"device": "cpu", "precision": "fp32"})
    generator = config.build_generator()
    weights = state["networks"]["generator"]
    if "generator" in state["averaged"]:
        # AveragedModel keeps the network under "module", beside a count.
        averaged = state["averaged"]["generator"]
        weights = {name.removeprefix("module."): value for name, value in averaged.items() if name != "n_averaged"}
    try:
        generator.load_state_dict(weights)
    except RuntimeError as error:
        raise TrainingError(f"{path}: the generator's weights do not fit its settings ({error})") from error
    return config, generator.eval()


def _grid(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"must be ROWSxCOLUMNS, such as 8x8, got {text!r}")
    return int(found[1]), int(found[2])


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 0 and below 2**32, got {text!r}")
    return int(text)


def _picture(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"must be the name of a .png file, got {text!r}")
    return path
