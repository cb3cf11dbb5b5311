"""What a run leaves in its folder beside the checkpoint, and what it shows while it runs."""

import contextlib
import fcntl
import io
import json
import math
import os
import shutil
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

from fastgan.train.checkpoint import TrainingError, write_atomically

# Everything a run writes; an earlier run's files are moved aside by these names.
FILES = ("config.json", "metrics.jsonl", "losses.png", "samples", "samples.gif", "checkpoint.pt", "checkpoints", "alarms.jsonl",
         "tensorboard", "categories.png", "confusion.png", "density.png", "gradients.png", "optimal.png", "summary.json")


class Claim:
    """Keeps the runs of other processes out of a folder while it is referenced; made by :func:`claim_folder`."""

    def __init__(self, descriptor: int):
        weakref.finalize(self, os.close, descriptor)


# Of this process, by device and inode of the folder: a claim holds for all of its runs.
_claims: weakref.WeakValueDictionary[tuple[int, int], Claim] = weakref.WeakValueDictionary()


def claim_folder(folder: Path) -> Claim | None:
    """Make the output folder and claim it; None where the file system has no locks.

    Raises:
        TrainingError: the folder cannot be made, or the run of another process writes to it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"--output {folder}: cannot be written to ({error.strerror or error})") from error
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # a folder that may be written to and not read
        return None
    status = os.fstat(descriptor)
    key = status.st_dev, status.st_ino
    if (held := _claims.get(key)) is not None:
        os.close(descriptor)
        return held
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise TrainingError(f"--output {folder}: another run is writing to it") from error
        return None
    _claims[key] = claim = Claim(descriptor)
    return claim


def prepare_folder(folder: Path) -> None:
    """Move the files of an earlier run in the output folder into its subfolder ``previous_N``.

    Raises:
        TrainingError: the folder cannot be written to.
    """
    try:
        earlier = [folder / name for name in FILES if (folder / name).exists()]
        if earlier:
            number = 1
            while (folder / f"previous_{number}").exists():
                number += 1
            aside = folder / f"previous_{number}"
            aside.mkdir()
            for path in earlier:
                path.rename(aside / path.name)
            say(f"{folder} held an earlier run: moved to {aside}")
    except OSError as error:
        raise TrainingError(f"--output {folder}: cannot be written to ({error.strerror or error})") from error


def copy_history(source: Path, folder: Path) -> None:
    """Copy the figures and sample grids of a run that goes on in another folder. Raises TrainingError."""
    try:
        shutil.copytree(source / "samples", folder / "samples")
        shutil.copy(source / "metrics.jsonl", folder)
        if (source / "alarms.jsonl").exists():
            shutil.copy(source / "alarms.jsonl", folder)
        if (source / "tensorboard").exists():
            shutil.copytree(source / "tensorboard", folder / "tensorboard")
    except OSError as error:
        raise TrainingError(f"{source} cannot be copied to {folder}: {error.strerror or error}") from error


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


class Metrics:
    """metrics.jsonl, one line a logged step, or another such file.

    Args:
        path: the file; lines beyond ``step`` (written after the checkpoint that a run resumes from) are dropped, and
            so is what follows the first that is none, as of a write cut short by a kill or a power cut.
        step: the step the run starts from.
    """

    def __init__(self, path: Path, step: int):
        self.path = path
        kept = [record for record in self.read() if record["step"] <= step]
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept).encode())

    def read(self) -> list[dict[str, Any]]:
        records = []
        if self.path.exists():
            for line in self.path.read_text(errors="replace").splitlines():
                try:
                    record = json.loads(line)
                except ValueError:
                    break
                if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                    break
                records.append(record)
        return records

    def append(self, record: dict[str, Any]) -> None:
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise TrainingError(f"{self.path} cannot be written: {error.strerror or error}") from error


def say(text: str) -> None:
    """Print a line. A run goes on where nobody reads it any more: a pipe or a terminal that was closed."""
    if sys.stdout is None:
        return
    with _outliving(sys.stdout):
        tqdm.write(text)
        sys.stdout.flush()


@contextlib.contextmanager
def _outliving(stream: Any) -> Iterator[None]:
    """Inside, ``stream`` may fail, and goes nowhere from then on."""
    try:
        yield
    except OSError:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # it may have no file of the system's
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


class Progress:
    """A progress bar; plain lines, ten seconds or more apart, where there is no terminal."""

    def __init__(self, step: int, total: int, *, hidden: bool = False):
        self.bar = tqdm(initial=step, total=total, unit="it", disable=hidden or None, dynamic_ncols=True)
        self.first, self.total = step, total
        self.started = self.printed = time.monotonic()
        self.figures: dict[str, float] = {}  # the latest of each, also of those that come once an epoch

    def advance(self) -> None:
        with _outliving(sys.stderr):
            self.bar.update()

    def show(self, record: dict[str, Any], *, always: bool = False) -> None:
        """Show the figures of a logged step; ``always`` prints the plain line whatever the time."""
        self.figures |= {name: value for name, value in record.items() if name not in ("step", "images_per_second")}
        if not self.bar.disable:
            self.bar.set_postfix(self.figures, refresh=False)
            return
        now = time.monotonic()
        if always or now - self.printed >= 10:
            self.printed = now
            rate = (record["step"] - self.first) / (now - self.started)
            left = tqdm.format_interval((self.total - record["step"]) / rate)
            shown = "  ".join(f"{name} {value:.4g}" for name, value in self.figures.items())
            say(f"step {record['step']}/{self.total}  {shown}  {rate:.3g} it/s  {left} left")

    def close(self) -> None:
        with _outliving(sys.stderr):
            self.bar.close()


def save_grid(path: Path, images: torch.Tensor, columns: int | None = None) -> None:
    """Write images [N, 1 or 3, H, W] as one grid, a square one without ``columns``; small images enlarged to be seen.

    -1 is black and 1 white; what lies beyond is cut off.

    Raises:
        TrainingError: the file cannot be written.
    """
    count, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    border = 2
    grid = torch.zeros(channels, rows * (height + border) + border, columns * (width + border) + border)
    for i, image in enumerate(images.detach().float().cpu()):
        top, left = (border + k * (size + border) for k, size in zip(divmod(i, columns), (height, width)))
        grid[:, top : top + height, left : left + width] = (image + 1) / 2
    pixels = grid.mul(255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)
    enlarged = max(1, 64 // height)
    buffer = io.BytesIO()
    picture.resize((picture.width * enlarged, picture.height * enlarged), Image.Resampling.NEAREST).save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())


def save_animation(path: Path, frames: list[Path]) -> None:
    """Write an animated GIF of the sample grids, of a hundred at most; the last one stays longer. Damaged ones are left out."""
    stride = math.ceil(len(frames) / 100)
    pictures = []
    for frame in frames[::-stride][::-1]:
        with contextlib.suppress(Exception):  # PIL raises many kinds
            # The octree takes a quarter of the time that the default takes in colour.
            pictures.append(Image.open(frame).quantize(method=Image.Quantize.FASTOCTREE))
    if not pictures:
        return
    durations = [max(50, min(500, 6000 // len(pictures)))] * (len(pictures) - 1) + [2000]
    buffer = io.BytesIO()
    pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0)
    write_atomically(path, buffer.getvalue())


def legend_above(axis: Axes, **options: Any) -> None:
    """A legend above the panel, where it covers no curve."""
    axis.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0, frameon=False, **options)


def save_curves(path: Path, records: list[dict[str, Any]]) -> None:
    """Draw the logged figures over the steps; names that begin alike (``loss_d``, ``loss_g``) share a panel."""
    panels: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for record in records for name in record):
        if name not in ("step", "epoch", "images_per_second"):
            panels.setdefault(name.partition("_")[0], []).append(name)
    figure = Figure(figsize=(8, 2.8 * max(1, len(panels))), layout="constrained")
    axes = figure.subplots(max(1, len(panels)), sharex=True, squeeze=False)[:, 0]
    labels = {"loss": "loss", "d": "mean output of D"}
    for axis, (prefix, names) in zip(axes, panels.items()):
        for name in names:
            points = [(record["step"], record[name]) for record in records if name in record]
            label = {"d_real": "D(x)", "d_fake": "D(G(z))"}.get(name, name)
            axis.plot(*zip(*points), linewidth=0.9, marker="o" if len(points) == 1 else None, label=label)
        axis.set_ylabel(labels.get(prefix, names[0].replace("_", " ") if len(names) == 1 else prefix))
        axis.grid(alpha=0.3)
        if len(names) > 1:
            legend_above(axis, ncols=len(names))
    axes[-1].set_xlabel("step")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    write_atomically(path, buffer.getvalue())
