"""Scores of generated images, and the real images nearest to them."""

from pathlib import Path

import torch
from torch import Tensor, nn

from fastgan.data import ImageDataset, normalize
from fastgan.metrics.distances import (
    frechet_distance, kernel_distance, nearest_images, nearest_neighbour_test, precision_recall,
)
from fastgan.metrics.features import Extractor, cache_folder
from fastgan.train.checkpoint import save_checkpoint
from fastgan.train.config import TrainConfig
from fastgan.train.outputs import save_grid

# Real images that features are computed of, at most.
REAL_SAMPLES = 10_000
# cdist holds a matrix of these squared.
NEIGHBOUR_SAMPLES = 2000
# Images generated at a time.
CHUNK = 1000
# Images that a score needs at least.
SCORED = 6


@torch.no_grad()
def generate(config: TrainConfig, generator: nn.Module, count: int, *, seed: int = 0) -> Tensor:
    """Draw images from a trained generator.

    Args:
        config: settings of its run; with the generator as of :func:`fastgan.sample.load_generator`.
        generator: the network.
        count: images. The vector GAN of ten digits gives a tenth of each in order in every thousand, and in the rest.
        seed: of the noise.

    Returns:
        float32 [count, C, H, W] in [-1, 1], on the CPU.

    Raises:
        ValueError: a count that does not divide into equal parts for networks side by side.
    """
    if count < 1 or count % config.side_by_side:
        raise ValueError(f"generate: count must be a multiple of {config.side_by_side} from 1 up, got {count}")
    random = torch.Generator().manual_seed(seed)
    return torch.cat([generator(config.latent(min(CHUNK, count - done), random)) for done in range(0, count, CHUNK)])


def score(extractor: Extractor, real: Tensor, images: Tensor) -> dict[str, float]:
    """Compare generated images with real ones.

    Args:
        extractor: gives features and class probabilities.
        real: features of the real images, as of :func:`real_features`; cut to as many as there are images.
        images: [N, C, H, W], float in [-1, 1] or uint8.

    Returns:
        ``frechet_distance``, ``kernel_distance``, ``precision``, ``recall``, ``density``, ``coverage``,
        ``nearest_neighbour_accuracy``; with an extractor that knows classes also ``confident`` (part of the images with
        a class probability over 0.9) and ``confidence`` (mean of the highest class probability).

    Raises:
        ValueError: fewer than 6 images, or images and real features that do not fit together.
    """
    real = real[: len(images)]
    fake, probabilities = extractor(images)
    few = slice(NEIGHBOUR_SAMPLES)
    # Ordered sets (classes one after the other) are shuffled before a part is taken.
    fake = fake[torch.randperm(len(fake), generator=torch.Generator().manual_seed(0))]
    figures = {
        "frechet_distance": frechet_distance(real, fake),
        "kernel_distance": kernel_distance(real[few], fake[few]),
        **precision_recall(real[few], fake[few])._asdict(),
        "nearest_neighbour_accuracy": nearest_neighbour_test(real[few], fake[few]).accuracy,
    }
    if probabilities is not None:
        highest = probabilities.amax(1)
        figures |= {"confident": float((highest > 0.9).double().mean()), "confidence": float(highest.mean())}
    return figures


def real_features(extractor: Extractor, dataset: ImageDataset) -> Tensor:
    """Features of the images of a data set, from the cache where they are there.

    Args:
        extractor: its name is part of the file's name in the cache.
        dataset: its images; their fingerprint is the other part.

    Returns:
        float32 [N, D] of 10,000 images at most, in a fixed random order.
    """
    path = cache_folder() / f"features-{extractor.name.replace(' ', '-')}-{dataset.fingerprint():08x}.pt"
    if path.is_file():
        return torch.load(path, weights_only=True)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:REAL_SAMPLES]
    features, _ = extractor(dataset.images[order])
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, features)
    return features


def save_nearest(path: Path, samples: Tensor, dataset: ImageDataset) -> dict[str, float]:
    """Check for copies: a picture with the nearest training image (by pixels) to the right of each sample.

    Args:
        path: of the picture, a grid of four pairs a row.
        samples: [N, C, H, W] in [-1, 1], of the size of the training images; 32 evenly spread over them are drawn.
        dataset: the training images.

    Returns:
        ``nearest_distance``: median over the samples of the distance to the nearest training image;
        ``nearest_distance_real``: the same from each training image to the nearest other one. Copies have a distance
        near 0; new images are about as far from the training images as those are from each other.

    Raises:
        ValueError: samples of another size than the training images.
        TrainingError: the file cannot be written.
    """
    if samples.shape[1:] != dataset.image_shape:
        shape = ", ".join(map(str, ("N", *dataset.image_shape)))
        raise ValueError(f"save_nearest: samples must have shape [{shape}], got {list(samples.shape)}")
    real = normalize(dataset.images)
    nearest = real[nearest_images(samples, real)]
    count = min(32, len(samples))
    drawn = torch.arange(count) * len(samples) // count  # of every class, where they lie one after the other
    save_grid(path, torch.stack([samples[drawn], nearest[drawn]], 1).flatten(0, 1), 8)
    flat = real[:NEIGHBOUR_SAMPLES].flatten(1)
    others = torch.cdist(flat, real.flatten(1))
    others[torch.arange(len(flat)), torch.arange(len(flat))] = torch.inf
    return {
        "nearest_distance": float((samples - nearest).flatten(1).norm(dim=1).median()),
        "nearest_distance_real": float(others.amin(1).median()),
    }
