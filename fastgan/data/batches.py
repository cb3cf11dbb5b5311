"""Shuffled batches of a data set in memory, taken on the device rather than image by image."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastgan.data.datasets import ImageDataset
from fastgan.data.idx import DataError


class Batch(NamedTuple):
    """Images float32 [N, C, H, W] in [-1, 1]; labels int64 [N], or None where the set has none."""

    images: Tensor
    labels: Tensor | None

    def split(self, parts: int) -> "list[Batch]":
        """The batch in ``parts`` equal ones."""
        size = len(self.images) // parts
        images = self.images.split(size)
        return [Batch(*part) for part in zip(images, [None] * parts if self.labels is None else self.labels.split(size))]


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
        parts: equal parts that a batch consists of, one after the other.

    Raises:
        DataError: fewer images than one batch.
    """

    def __init__(self, dataset: ImageDataset, batch_size: int, seed: int, device: torch.device | str = "cpu", *,
                 parts: int = 1):
        if not 1 <= batch_size <= len(dataset):
            got = batch_size if parts == 1 else f"{parts} parts of {batch_size // parts}"
            raise DataError(
                f"batch_size must be between 1 and the number of images, {len(dataset)} in {dataset.name!r}, got {got}"
            )
        self.images = dataset.images.to(device)
        self.labels = None if dataset.labels is None else dataset.labels.to(device)
        self.batch_size = batch_size
        self.seed = seed
        self.parts = parts
        self.share: Callable[[Tensor], Tensor] = lambda rows: rows

    def divide(self, processes: int, share: Callable[[Tensor], Tensor]) -> None:
        """Give from now on only this process's share of every batch.

        Args:
            processes: how many share a batch.
            share: takes the rows of this process out of those of a whole batch.

        Raises:
            DataError: a batch of parts that cannot be shared equally.
        """
        if self._part_size % processes:
            raise DataError(
                f"batch_size must be divisible by the number of processes, {processes}, got {self._part_size}"
            )
        self.share = share

    @property
    def _part_size(self) -> int:
        """Images in each of the parts."""
        return self.batch_size // self.parts

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.images) // self.batch_size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch (counted from 0), from the batch number ``start`` on."""
        # On the CPU, so that the order is the same on every device. Its generator takes 32 bits of a seed;
        # the odd factor keeps the epochs of one seed apart from those of its neighbours.
        generator = torch.Generator().manual_seed((self.seed * 0x9E3779B1 + epoch) % 2**32)
        order = self._order(generator).to(self.images.device)
        size = len(order) // len(self)
        for number in range(start, len(self)):
            chosen = self.share(order[number * size : (number + 1) * size])
            labels = None if self.labels is None else self.labels[chosen]
            yield Batch(normalize(self.images.index_select(0, chosen)), labels)  # copies whole images, as indexing does not

    def _order(self, generator: torch.Generator) -> Tensor:
        """Positions of the images of an epoch, whole batches of them one after the other."""
        return torch.randperm(len(self.images), generator=generator)[: len(self) * self.batch_size]


class ClassBatches(Batches):
    """Batches of equally many images of each of some classes, the classes in order.

    An epoch takes every image of the smallest class about once.

    Args:
        dataset: the images, with labels.
        batch_size: images of each class in a batch, which holds ``len(classes)`` times as many.
        seed: seed of the order.
        classes: the labels wanted.
        device: where the batches are made.

    Raises:
        DataError: a data set without labels, or fewer images of a class than one batch.
    """

    def __init__(self, dataset: ImageDataset, batch_size: int, seed: int, classes: Sequence[int],
                 device: torch.device | str = "cpu"):
        if dataset.labels is None:
            raise DataError(f"the data set {dataset.name!r} has no labels to choose classes by")
        self.members = [torch.nonzero(dataset.labels == label).flatten() for label in classes]
        for label, members in zip(classes, self.members):
            if not 1 <= batch_size <= len(members):
                raise DataError(
                    f"batch_size must be between 1 and the number of images of class {label}, {len(members)} in "
                    f"{dataset.name!r}, got {batch_size}"
                )
        super().__init__(dataset, batch_size, seed, device, parts=len(self.members))

    def __len__(self) -> int:
        return min(map(len, self.members)) // self.batch_size

    @property
    def _part_size(self) -> int:
        return self.batch_size

    def _order(self, generator: torch.Generator) -> Tensor:
        parts = [
            members[torch.randperm(len(members), generator=generator)[: len(self) * self.batch_size]]
            for members in self.members
        ]
        return torch.stack([part.view(len(self), self.batch_size) for part in parts], 1).flatten()


def normalize(images: Tensor) -> Tensor:
    """Pixels to numbers in [-1, 1], the range of tanh.

    Args:
        images: uint8, any shape.

    Returns:
        float32 of the same shape.
    """
    return images.float().div_(127.5).sub_(1)
