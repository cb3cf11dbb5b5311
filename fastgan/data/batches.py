"""Shuffled batches of a data set in memory, taken on the device rather than image by image."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastgan.data.datasets import ImageDataset
from fastgan.data.idx import DataError


class Batch(NamedTuple):
    """Images float32 [N, C, H, W] in [-1, 1]; labels int64 [N], or None where the set has none."""

    images: Tensor
    labels: Tensor | None


class Batches:
    """Deterministic epochs of equally large batches.

    The order of an epoch depends on the seed and the epoch's number alone, so that a run can be taken
    up at any batch of any epoch. The images that do not fill the last batch are left out of that epoch
    (another few in every epoch): batch statistics and the CatGAN's marginal want equal batches.

    Args:
        dataset: the images; moved to ``device`` once.
        batch_size: images in a batch.
        seed: seed of the order.
        device: where the batches are made.

    Raises:
        DataError: fewer images than one batch.
    """

    def __init__(self, dataset: ImageDataset, batch_size: int, seed: int, device: torch.device | str = "cpu"):
        if not 1 <= batch_size <= len(dataset):
            raise DataError(
                f"batch_size must be between 1 and the number of images, {len(dataset)} in {dataset.name!r}, "
                f"got {batch_size}"
            )
        self.images = dataset.images.to(device)
        self.labels = None if dataset.labels is None else dataset.labels.to(device)
        self.batch_size = batch_size
        self.seed = seed

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.images) // self.batch_size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch (counted from 0), from the batch number ``start`` on."""
        # On the CPU, so that the order is the same on every device. Its generator takes 32 bits of a seed;
        # the odd factor keeps the epochs of one seed apart from those of its neighbours.
        generator = torch.Generator().manual_seed((self.seed * 0x9E3779B1 + epoch) % 2**32)
        order = torch.randperm(len(self.images), generator=generator).to(self.images.device)
        for number in range(start, len(self)):
            chosen = order[number * self.batch_size : (number + 1) * self.batch_size]
            labels = None if self.labels is None else self.labels[chosen]
            yield Batch(normalize(self.images[chosen]), labels)


def normalize(images: Tensor) -> Tensor:
    """uint8 images to float32 in [-1, 1], the range of tanh."""
    return images.float().div_(127.5).sub_(1)
