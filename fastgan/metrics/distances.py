"""Distances between two sets of samples, given by their features.

Every function takes ``real`` [N, D] and ``fake`` [M, D], features of any extractor, floating point; it computes in
float64 and returns Python floats. The Fréchet distance needs about 10,000 samples; the kernel distance is unbiased
for small sets too. Scores from different extractors are not comparable.
"""

from typing import NamedTuple

import torch
from torch import Tensor


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """Squared Fréchet distance between the Gaussians with the mean and covariance of each set.

    Heusel et al. 2017 (arXiv 1706.08500), equation 6: ``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))``.

    Args:
        real: features of real images, [N, D].
        fake: features of generated images, [M, D].

    Returns:
        0 for equal Gaussians; in squared units of the features.

    Raises:
        ValueError: features of other shapes, or fewer than 2 samples in a set.
    """
    real, fake = _checked("frechet_distance", real, fake, 2)
    root = _symmetric_root(real.T.cov(correction=1).reshape(real.shape[1], -1))
    covariance = fake.T.cov(correction=1).reshape(fake.shape[1], -1)
    # tr (C1 C2)^(1/2) = tr (C1^(1/2) C2 C1^(1/2))^(1/2), whose argument is symmetric.
    cross = torch.linalg.eigvalsh(root @ covariance @ root).clamp(min=0).sqrt().sum()
    distance = (real.mean(0) - fake.mean(0)).square().sum() + (root @ root).trace() + covariance.trace() - 2 * cross
    return max(float(distance), 0.0)


def kernel_distance(real: Tensor, fake: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy under the kernel ``(x.y / D + 1)^3``; it may fall below 0.

    Bińkowski et al. 2018 (arXiv 1801.01401), the kernel inception distance on features of any kind.

    Args:
        real: features of real images, [N, D].
        fake: features of generated images, [M, D].

    Returns:
        About 0 for sets from one distribution.

    Raises:
        ValueError: features of other shapes, or fewer than 2 samples in a set.
    """
    real, fake = _checked("kernel_distance", real, fake, 2)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def mean_of_pairs(x: Tensor) -> Tensor:
        k = kernel(x, x)
        return (k.sum() - k.trace()) / (len(x) * (len(x) - 1))

    return float(mean_of_pairs(real) + mean_of_pairs(fake) - 2 * kernel(real, fake).mean())


class Coverage(NamedTuple):
    """How much of each set lies within the other, judged by balls around each sample up to its k-th neighbour.

    Attributes:
        precision: part of the fakes within a ball of the real set; 0 to 1.
        recall: part of the real samples within a ball of the fakes; 0 to 1.
        density: real balls a fake lies in, over k; near 1 for equal sets, above for fakes where data is dense.
        coverage: part of the real balls that hold a fake; 0 to 1.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def precision_recall(real: Tensor, fake: Tensor, *, neighbours: int = 5) -> Coverage:
    """Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020, equations 4 and 5).

    Args:
        real: features of real images, [N, D].
        fake: features of generated images, [M, D].
        neighbours: k, whose distance is the radius of a sample's ball.

    Returns:
        The four figures.

    Raises:
        ValueError: features of other shapes, or no more than ``neighbours`` samples in a set.
    """
    real, fake = _checked("precision_recall", real, fake, neighbours + 1)
    real_radii, fake_radii = _radii(real, neighbours), _radii(fake, neighbours)
    distances = torch.cdist(real, fake)  # [N, M]
    within_real = distances <= real_radii[:, None]
    return Coverage(
        precision=float(within_real.any(0).double().mean()),
        recall=float((distances <= fake_radii[None]).any(1).double().mean()),
        density=float(within_real.sum(0).double().mean() / neighbours),
        coverage=float((distances.min(1).values <= real_radii).double().mean()),
    )


class TwoSampleTest(NamedTuple):
    """Accuracy of the leave-one-out 1-nearest-neighbour classifier that tells two sets apart.

    0.5 for sets from one distribution, 1 for sets apart, below 0.5 for fakes that copy the real samples.
    """

    accuracy: float
    real_accuracy: float
    fake_accuracy: float


def nearest_neighbour_test(real: Tensor, fake: Tensor) -> TwoSampleTest:
    """The 1-nearest-neighbour two-sample test (Lopez-Paz and Oquab 2017), on equally many samples of each.

    The larger set is cut to the size of the smaller.

    Args:
        real: features of real images, [N, D].
        fake: features of generated images, [M, D].

    Returns:
        The accuracies over both sets and over each.

    Raises:
        ValueError: features of other shapes, or fewer than 2 samples in a set.
    """
    real, fake = _checked("nearest_neighbour_test", real, fake, 2)
    count = min(len(real), len(fake))
    both = torch.cat([real[:count], fake[:count]])
    distances = torch.cdist(both, both).fill_diagonal_(torch.inf)
    right = (distances.argmin(1) < count) == (torch.arange(2 * count, device=both.device) < count)
    real_accuracy, fake_accuracy = (float(part.double().mean()) for part in right.split(count))
    return TwoSampleTest((real_accuracy + fake_accuracy) / 2, real_accuracy, fake_accuracy)


def nearest_images(queries: Tensor, images: Tensor) -> Tensor:
    """The image nearest to each query, by Euclidean distance of the pixels.

    Args:
        queries: [M, ...], any dtype.
        images: [N, ...] of the same shape apart from the count.

    Returns:
        Index int64 [M] into images.
    """
    # In float32 the squares that cdist subtracts cancel: it takes another image for the nearest of similar ones.
    queries = queries.flatten(1).double()
    nearest = [torch.cdist(queries, part.flatten(1).double()).min(1) for part in images.split(1000)]
    part = torch.stack([each.values for each in nearest]).argmin(0)
    return 1000 * part + torch.stack([each.indices for each in nearest]).gather(0, part[None])[0]


class Appearance(NamedTuple):
    """How images look. ``contrast``: mean over the images of the standard deviation of their pixels. ``sharpness``: mean
    size of the second difference between neighbouring pixels, over the contrast; noise counts as sharp too.
    """

    contrast: float
    sharpness: float


def appearance(images: Tensor) -> Appearance:
    """Contrast and sharpness of images.

    Args:
        images: [N, C, H, W].

    Returns:
        The contrast in units of the pixel values, the sharpness without unit.
    """
    contrast = images.flatten(1).double().std(1).mean()
    second = [images.double().diff(n=2, dim=dim).abs().mean() for dim in (-1, -2)]
    return Appearance(float(contrast), float(sum(second) / 2 / contrast))


def _radii(features: Tensor, neighbours: int) -> Tensor:
    # The nearest of all is the sample itself, at distance 0.
    return torch.cdist(features, features).kthvalue(neighbours + 1, 1).values


def _symmetric_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def _checked(function: str, real: Tensor, fake: Tensor, least: int) -> tuple[Tensor, Tensor]:
    for name, features in (("real", real), ("fake", fake)):
        if features.dim() != 2 or len(features) < least:
            raise ValueError(f"{function}: {name} must have shape [N, D] with N of at least {least}, got {list(features.shape)}")
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"{function}: fake must have as many features as real, {real.shape[1]}, got {fake.shape[1]}")
    return real.double(), fake.double()
