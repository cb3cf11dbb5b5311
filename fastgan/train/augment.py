"""Differentiable augmentation (Zhao et al. 2020, arXiv 2006.10738), which lets a discriminator learn from few images.

Real and generated images are changed alike before the discriminator sees them, and the generator's gradient passes
through the change: so the discriminator cannot learn the few training images by heart, and the generator does not
learn the changes.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def augment(images: Tensor) -> Tensor:
    """Change the colour of images, shift them and cut a square out, each image by random amounts of its own.

    Args:
        images: [N, C, H, W] in [-1, 1].

    Returns:
        Images of that shape: brightness by up to half, saturation and contrast by up to a factor, shifts by up to an eighth
        of the size (filled with zeros), a square hole of the largest odd number of pixels within half the size. Differentiable
        in the images.
    """
    count, _, height, width = images.shape

    def random(low: float, high: float) -> Tensor:
        return torch.empty(count, 1, 1, 1, device=images.device, dtype=images.dtype).uniform_(low, high)

    images = images + random(-0.5, 0.5)
    if images.shape[1] > 1:
        grey = images.mean(1, keepdim=True)
        images = grey + (images - grey) * random(0, 2)
    mean = images.mean((1, 2, 3), keepdim=True)
    images = mean + (images - mean) * random(0.5, 1.5)

    # Shifts: whole pixels, from a picture with a margin.
    margin = max(1, round(max(height, width) / 8))
    rows, columns = _ranges(count, height, 2 * margin, images), _ranges(count, width, 2 * margin, images)
    padded = F.pad(images, (margin,) * 4)
    number = torch.arange(count, device=images.device)[:, None, None]
    images = padded.permute(0, 2, 3, 1)[number, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

    # The hole's centre may lie anywhere, so that it also falls partly outside.
    inside = [_hole(count, size, images) for size in (height, width)]
    return images * ~(inside[0][:, None, :, None] & inside[1][:, None, None, :])


def _ranges(count: int, size: int, highest: int, like: Tensor) -> Tensor:
    """``size`` consecutive positions [count, size] from a random start in 0 ... highest for each image."""
    start = torch.randint(0, highest + 1, (count, 1), device=like.device)
    return start + torch.arange(size, device=like.device)


def _hole(count: int, size: int, like: Tensor) -> Tensor:
    """Whether a position [count, size] lies in the hole around a random centre, of the largest odd number within half the size."""
    centre = torch.randint(0, size, (count, 1), device=like.device)
    return (torch.arange(size, device=like.device) - centre).abs() <= (size // 2 - 1) / 2
