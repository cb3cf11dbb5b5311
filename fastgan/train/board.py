"""The figures and sample grids of a run for TensorBoard."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastgan._extras import require
from fastgan.train.checkpoint import TrainingError

FOLDER = "tensorboard"


class Board:
    """Writes TensorBoard's files into the subfolder ``tensorboard`` of a run.

    Args:
        output: folder of the run.
        step: the step it starts from; what was written of later ones, before a kill, is not shown.

    Raises:
        TrainingError: TensorBoard is not installed.
    """

    def __init__(self, output: Path, step: int):
        self.writer = _library().SummaryWriter(output / FOLDER, purge_step=step + 1)

    def log(self, record: dict[str, Any]) -> None:
        """Add the figures of a line of metrics.jsonl."""
        for name, value in record.items():
            if name != "step":
                self.writer.add_scalar(name, value, record["step"])

    def draw(self, grid: Path, step: int) -> None:
        """Add a grid of samples, and make sure that all there is can be read."""
        pixels = np.asarray(Image.open(grid))
        self.writer.add_image("samples", pixels, step, dataformats="HW" if pixels.ndim == 2 else "HWC")
        self.writer.flush()


def require_tensorboard() -> None:
    """Raises TrainingError where TensorBoard is not installed."""
    _library()


def _library():
    try:
        return require("torch.utils.tensorboard", "tensorboard", "--tensorboard")
    except ModuleNotFoundError as error:
        raise TrainingError(str(error)) from error
