"""Pictures of what a CatGAN's classifier does."""

import io
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor

from fastgan.metrics.clustering import UNMAPPED, hungarian_map, majority_map
from fastgan.train.checkpoint import write_atomically


def save_confusion(path: Path, confusion: Tensor, error: float) -> None:
    """Draw the confusion matrix, int64 [C, C + 1] as of :class:`fastgan.metrics.clustering.Evaluation`."""
    unmapped = confusion[:, -1].any()
    shown = confusion if unmapped else confusion[:, :-1]
    figure = Figure(figsize=(6.4, 5.8), layout="constrained")
    axis = figure.subplots()
    shares = shown / shown.sum(1, keepdim=True).clamp_min(1)
    axis.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    for row in range(shown.shape[0]):
        for column in range(shown.shape[1]):
            if count := int(shown[row, column]):
                color = "white" if shares[row, column] > 0.5 else "black"
                axis.text(column, row, count, ha="center", va="center", fontsize=8, color=color)
    columns = range(shown.shape[1])
    axis.set_xticks(columns, ["none" if unmapped and c == shown.shape[1] - 1 else c for c in columns])
    axis.set_yticks(range(shown.shape[0]))
    axis.set(xlabel="predicted class", ylabel="class", title=f"error {error:.2f}%")
    _write(path, figure)


def save_categories(path: Path, counts: Tensor, categories: Tensor, images: Tensor) -> None:
    """Draw the map from categories to classes, and some images of each category.

    Args:
        path: the PNG file.
        counts: [K, C], how often each category meets each class among the images that the map was fitted on.
        categories: predicted categories of ``images``, int64 [N].
        images: uint8 [N, C, H, W].
    """
    number, classes = counts.shape
    majority, one_to_one = majority_map(counts), hungarian_map(counts)
    order = sorted(range(number), key=lambda k: (int(majority[k]) == UNMAPPED, int(majority[k]), k))
    columns = 12
    figure = Figure(figsize=(9, 0.42 * number + 1), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
    shares = counts[order] / counts[order].sum(1, keepdim=True).clamp_min(1)
    left.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    left.set_xticks(range(classes))
    left.set_yticks(range(number), [f"{k}" for k in order])
    left.set(xlabel="class", ylabel="category", title="share of each class (ring: one-to-one map)")
    for row, k in enumerate(order):
        if int(one_to_one[k]) != UNMAPPED:
            left.plot(int(one_to_one[k]), row, "o", markersize=9, markerfacecolor="none", markeredgecolor="tab:red")
    height, width = images.shape[2:]
    sheet = images.new_full((number * height, columns * width, images.shape[1]), 0)
    for row, k in enumerate(order):
        for column, image in enumerate(images[categories == k][:columns]):
            sheet[row * height : (row + 1) * height, column * width : (column + 1) * width] = image.permute(1, 2, 0)
    right.imshow((sheet.squeeze(2) if sheet.shape[2] == 1 else sheet).numpy(), cmap="gray", vmin=0, vmax=255, aspect="auto")
    right.set_axis_off()
    right.set_title("images of the category")
    _write(path, figure)


def _write(path: Path, figure: Figure) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    write_atomically(path, buffer.getvalue())
