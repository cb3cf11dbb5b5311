"""Errors of classifiers and of clusterings, measured as the literature asks for.

The classifier runs in eval mode over the whole set. A clustering is judged through a map from categories to classes
that is fitted on labels of *training* images and then frozen: fitted on the test labels, or anew for every batch, it
would flatter the figure.
"""

import dataclasses
from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastgan.data import normalize

UNMAPPED = -1


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a classifier does on a labeled set.

    Attributes:
        error: percentage of images whose category maps to another class than theirs.
        confusion: int64 [classes, classes + 1]; row: the image's class, column: the class its category maps to, the
            last one for categories that map to none, or are none without a map.
    """

    error: float
    confusion: Tensor


@torch.no_grad()
def predict(classifier: nn.Module, images: Tensor, *, batch_size: int = 1000) -> Tensor:
    """The most probable category of each image, in eval mode.

    Args:
        classifier: maps images to logits [N, K]. Its training mode is as before afterwards.
        images: uint8 [N, C, H, W] as data sets hold them, or float32 in [-1, 1].
        batch_size: images at a time.

    Returns:
        int64 [N] on the CPU.
    """
    device = next(classifier.parameters()).device
    was_training = classifier.training
    classifier.eval()
    try:
        return torch.cat([classifier(_prepared(part, device)).argmax(1).cpu() for part in images.split(batch_size)])
    finally:
        classifier.train(was_training)


def count_categories(categories: Tensor, labels: Tensor, num_categories: int, num_classes: int) -> Tensor:
    """How often each category meets each class.

    Args:
        categories: int64 [N] in [0, num_categories).
        labels: int64 [N] in [0, num_classes).
        num_categories: rows of the result.
        num_classes: columns of the result.

    Returns:
        int64 [num_categories, num_classes].
    """
    pairs = torch.bincount(categories * num_classes + labels, minlength=num_categories * num_classes)
    return pairs.view(num_categories, num_classes)


def majority_map(counts: Tensor) -> Tensor:
    """The class each category mostly holds; several categories may share a class.

    Args:
        counts: [K, C] as of :func:`count_categories`, of images the error is *not* measured on.

    Returns:
        int64 [K], UNMAPPED for a category without any image.
    """
    return torch.where(counts.sum(1) > 0, counts.argmax(1), UNMAPPED)


def hungarian_map(counts: Tensor) -> Tensor:
    """The one-to-one map with the most agreement (Kuhn 1955).

    Args:
        counts: [K, C] as of :func:`count_categories`, of images the error is *not* measured on.

    Returns:
        int64 [K]. With more categories than classes the others stay UNMAPPED, and their images count as errors.
    """
    chosen = torch.full((len(counts),), UNMAPPED)
    rows, columns = linear_sum_assignment(counts.numpy(), maximize=True)
    chosen[torch.from_numpy(rows)] = torch.from_numpy(columns)
    return chosen


def evaluate(categories: Tensor, labels: Tensor, num_classes: int, mapping: Tensor | None = None) -> Evaluation:
    """Error and confusion matrix of predictions.

    Args:
        categories: predicted categories, int64 [N].
        labels: true classes, int64 [N] in [0, num_classes).
        num_classes: classes there are.
        mapping: class of each category, int64 [K], fitted on other images; None where categories are classes.

    Returns:
        The error in percent and the confusion matrix.

    Raises:
        ValueError: categories and labels differ in length, or there are none.
    """
    if categories.shape != labels.shape or len(labels) == 0:
        raise ValueError(
            "evaluate: categories and labels must have the same shape [N] with N > 0, "
            f"got {list(categories.shape)} and {list(labels.shape)}"
        )
    predicted = categories if mapping is None else mapping[categories]
    column = torch.where((predicted == UNMAPPED) | (predicted >= num_classes), num_classes, predicted)
    confusion = count_categories(labels, column, num_classes, num_classes + 1)
    return Evaluation(100.0 * (predicted != labels).double().mean().item(), confusion)


@torch.no_grad()
def recalibrate_batch_norm(network: nn.Module, images: Tensor, *, batch_size: int = 500) -> None:
    """Measure the running statistics of a network's batch norms anew, over training images, without noise and dropout.

    For averaged weights, whose activations no running average has seen, where generated images went through the network
    too, and where noise in training mode gives the layers other inputs than they have in eval mode. Does nothing to a network
    without batch norm.

    Args:
        network: its running statistics are changed in place, or left as they were where it raises; each module's training
            mode is as before afterwards.
        images: as for :func:`predict`; some thousands are enough.
        batch_size: images at a time; the rest that does not fill a batch is left out.
    """
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    if not norms:
        return
    device = next(network.parameters()).device
    whole = images[: len(images) // batch_size * batch_size] if len(images) >= batch_size else images
    modes = [(module, module.training) for module in network.modules()]
    before = [(norm, norm.momentum, {name: buffer.clone() for name, buffer in norm.named_buffers()}) for norm in norms]
    network.eval()
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over the batches
            norm.train()
        for part in whole.split(batch_size):
            network(_prepared(part, device))
    except BaseException:
        for norm, _, buffers in before:
            norm.load_state_dict(buffers, strict=False)
        raise
    finally:
        for norm, momentum, _ in before:
            norm.momentum = momentum
        for module, training in modes:
            module.training = training


def mean_and_std(errors: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds and the sample standard deviation.

    Args:
        errors: a figure a seed, at least one.

    Returns:
        (mean, standard deviation); the latter is 0 for a single seed.
    """
    values = torch.tensor(errors, dtype=torch.float64)
    return values.mean().item(), values.std().item() if len(values) > 1 else 0.0


def _prepared(images: Tensor, device: torch.device) -> Tensor:
    images = images.to(device)
    return normalize(images) if images.dtype == torch.uint8 else images
