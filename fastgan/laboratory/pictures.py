"""Figures of the one-dimensional laboratory."""

import io
import math
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from fastgan.laboratory.experiment import STEPS_PER_EPOCH, Run
from fastgan.laboratory.mixture import Mixture, distances
from fastgan.train.checkpoint import write_atomically
from fastgan.train.outputs import legend_above

# The report's colours: data green, generated red, discriminator blue.
DATA, GENERATED, DISCRIMINATOR, OPTIMAL = "tab:green", "tab:red", "tab:blue", "black"
SPREAD = 0.15


def save_density(path: Path, run: Run) -> None:
    """Data, generated density of every seed and their mean, discriminators and the optimal one, at the end."""
    write_atomically(path, _png(_density_figure(run, -1)))


def save_evolution(folder: Path, run: Run) -> None:
    """The density figure of every frame: samples.gif, and for the end of every epoch samples/epoch_0001.png and on."""
    frames = []
    for number, step in enumerate(run.steps):
        picture = _png(_density_figure(run, number), 55)
        frames.append(Image.open(io.BytesIO(picture)).convert("P", palette=Image.Palette.ADAPTIVE, colors=64))
        if step and (step % STEPS_PER_EPOCH == 0 or step == run.steps[-1]):
            write_atomically(folder / "samples" / f"epoch_{math.ceil(step / STEPS_PER_EPOCH):04d}.png", picture)
    buffer = io.BytesIO()
    durations = [150] * (len(frames) - 1) + [2000]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)
    write_atomically(folder / "samples.gif", buffer.getvalue())


def save_curves(path: Path, run: Run) -> None:
    """Losses and distances over the steps: the median of the seeds, and the range that holds them all."""
    found = [distances(samples, run.config.data) for samples in run.samples]
    series = {name: torch.stack([each[name] for each in found]) for name in found[0]}
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    axes = figure.subplots(3, 2, sharex=True).flatten()
    for name, colour in (("loss_d", DISCRIMINATOR), ("loss_g", GENERATED)):
        _spread(axes[0], run.steps, run.losses[name], colour, name)
    axes[0].axhline(2 * math.log(2), color=DISCRIMINATOR, linewidth=0.8, linestyle=":", label="2 log 2: equal distributions")
    labels = {"ks": "Kolmogorov-Smirnov", "wasserstein": "Wasserstein-1", "js": "Jensen-Shannon (nats)",
              "std_ratio": "std ratio", "mean_error": "|mean error|"}
    limits = {"ks": (0.15, "criterion"), "js": (math.log(2), "log 2: no overlap"), "std_ratio": (1.0, "data"),
              "mean_error": (0.1, "criterion")}
    for axis, (name, label) in zip(axes[1:], labels.items()):
        _spread(axis, run.steps, series[name], GENERATED, label)
        if name in limits:
            axis.axhline(limits[name][0], color=OPTIMAL, linewidth=0.8, linestyle=":", label=limits[name][1])
    for axis in axes:
        axis.grid(alpha=0.3)
        legend_above(axis, fontsize=7, ncols=3)
    axes[-1].set_xlabel("step")
    axes[-2].set_xlabel("step")
    write_atomically(path, _png(figure))


def save_samples(path: Path, data: Mixture, samples: Tensor, columns: int) -> None:
    """A panel for each network: histogram of its samples [networks, N] over the density of the data."""
    low, high = data.limits(5)
    grid = torch.linspace(low, high, 401)
    panels = _panels(len(samples), columns)
    for axis, values in zip(panels.axes, samples):
        axis.plot(grid, data.density(grid), color=DATA)
        axis.hist(values.clamp(low, high).tolist(), bins=60, range=(low, high), density=True, color=GENERATED, alpha=0.6)
    write_atomically(path, _png(panels))


def save_walk(path: Path, data: Mixture, z: Tensor, samples: Tensor, columns: int) -> None:
    """A panel for each network: what it makes, [networks, N], of the inputs z [N]; two deviations of the data in green."""
    panels = _panels(len(samples), columns)
    for axis, values in zip(panels.axes, samples):
        axis.axhspan(*data.limits(2), color=DATA, alpha=SPREAD)
        axis.plot(z, values, color=GENERATED)
    write_atomically(path, _png(panels))


def save_optimal(path: Path, x: Tensor, found: Tensor, optimal: Tensor, error: float) -> None:
    """Discriminators [seeds, X] trained against a fixed generator, beside the optimal one [X]."""
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axis = figure.subplots()
    for curve in found:
        axis.plot(x, curve, color=DISCRIMINATOR, alpha=0.35, linewidth=0.8)
    axis.plot(x, optimal, color=OPTIMAL, linestyle="--", label="optimal p_d / (p_d + p_g)")
    axis.plot([], [], color=DISCRIMINATOR, label=f"trained, {len(found)} seeds: mean |error| {error:.3f}")
    axis.set(xlabel="x", ylabel="D(x)", ylim=(-0.05, 1.05))
    axis.legend(fontsize=8)
    write_atomically(path, _png(figure))


def save_gradient_norms(path: Path, norms: dict[str, Tensor]) -> None:
    """Norms of the generator's early gradient under each loss, [steps, seeds] by name."""
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axis = figure.subplots()
    for (name, values), colour in zip(norms.items(), (GENERATED, DISCRIMINATOR)):
        _spread(axis, range(1, len(values) + 1), values, colour, name)
    axis.set(xlabel="step of the discriminator alone", ylabel="norm of the generator's gradient", yscale="log")
    axis.grid(alpha=0.3)
    axis.legend()
    write_atomically(path, _png(figure))


def _density_figure(run: Run, frame: int) -> Figure:
    data, grid = run.config.data, run.grid
    low, high = data.limits(5)
    bins = 100
    width = (high - low) / bins
    centres = torch.linspace(low + width / 2, high - width / 2, bins)
    densities = torch.stack([
        torch.histc(samples, bins, low, high) / (samples.numel() * width) for samples in run.samples[frame]
    ])
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    left = figure.subplots()
    right = left.twinx()
    real = data.density(grid)
    left.plot(grid, real, color=DATA, label="data")
    for density in densities:
        left.plot(centres, density, color=GENERATED, alpha=SPREAD, linewidth=0.8)
    left.plot(centres, densities.mean(0), color=GENERATED, label=f"generated, mean of {len(densities)} seeds")
    for curve in run.curves[frame]:
        right.plot(grid, curve, color=DISCRIMINATOR, alpha=SPREAD, linewidth=0.8)
    right.plot(grid, run.curves[frame].mean(0), color=DISCRIMINATOR)
    left.plot([], [], color=DISCRIMINATOR, label="discriminator (right axis)")
    # Where neither has mass the optimum is not defined.
    mixed = data.density(centres) + densities.mean(0)
    right.plot(centres, (data.density(centres) / mixed).where(mixed > 0.01 * float(real.max()), torch.nan),
               color=OPTIMAL, linestyle="--", linewidth=0.9)
    left.plot([], [], color=OPTIMAL, linestyle="--", label="optimal p_d / (p_d + p_g)")
    left.set(xlabel="x", ylabel="density", ylim=(0, 2 * float(real.max())), xlim=(low, high), title=f"step {run.steps[frame]}")
    right.set(ylabel="D(x)", ylim=(0, 1))
    left.legend(fontsize=7, loc="upper left")
    return figure


def _panels(count: int, columns: int) -> Figure:
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(2.2 * columns, 1.6 * rows), layout="constrained")
    figure.subplots(rows, columns, sharex=True, sharey=True)
    return figure


def _spread(axis: Axes, steps, values: Tensor, colour: str, label: str) -> None:
    axis.plot(steps, values.median(1).values, color=colour, linewidth=1, label=label)
    axis.fill_between(steps, values.amin(1), values.amax(1), color=colour, alpha=SPREAD, linewidth=0)


def _png(figure: Figure, dpi: int = 80) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()
