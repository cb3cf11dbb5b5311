"""Scores of a trained generator beside those of held-out images."""

import os
from pathlib import Path

import torch
from torch import Tensor

from fastgan.data import load_dataset
from fastgan.metrics.distances import frechet_distance, kernel_distance, nearest_neighbour_test, precision_recall
from fastgan.metrics.features import FeatureExtractor
from fastgan.train.checkpoint import load_checkpoint
from fastgan.train.config import TrainConfig

# cdist holds a matrix of these squared.
NEIGHBOUR_SAMPLES = 2000
# Images generated at a time.
CHUNK = 1000


@torch.no_grad()
def generate(config_class: type[TrainConfig], path: str | os.PathLike, count: int, *, seed: int = 0) -> Tensor:
    """Draw images from the generator of a checkpoint, by its averaged weights where it has them.

    Args:
        config_class: settings of its model family.
        path: the checkpoint.
        count: images. The vector GAN of ten digits gives a hundred of each in order in every thousand.
        seed: of the noise.

    Returns:
        float32 [count, C, H, W] in [-1, 1], on the CPU.

    Raises:
        TrainingError: no checkpoint, or one of another family.
    """
    state = load_checkpoint(Path(path), config_class.family)
    config = config_class(**state["config"] | {"device": "cpu"})
    generator, _, _ = config.build(config.load_data())
    if "generator" in state["averaged"]:
        # AveragedModel keeps the network under "module", beside a count.
        averaged = state["averaged"]["generator"]
        weights = {name.removeprefix("module."): value for name, value in averaged.items() if name != "n_averaged"}
    else:
        weights = state["networks"]["generator"]
    generator.load_state_dict(weights)
    generator.eval()
    random = torch.Generator().manual_seed(seed)
    return torch.cat([generator(config.latent(min(CHUNK, count - done), random)) for done in range(0, count, CHUNK)])


def score(extractor: FeatureExtractor, dataset: str, images: Tensor, data_root: str | os.PathLike | None = None) -> dict[str, float]:
    """Compare generated images with the training images of a data set.

    Args:
        extractor: gives features and class probabilities.
        dataset: name of the data set compared with, as for :func:`fastgan.data.load_dataset`.
        images: [N, C, H, W], float in [-1, 1] or uint8; the training images are cut to as many.
        data_root: where the data files are.

    Returns:
        ``frechet_distance``, ``kernel_distance``, ``precision``, ``recall``, ``density``, ``coverage``,
        ``nearest_neighbour_accuracy``, ``confident`` (part of the images with a class probability over 0.9) and
        ``confidence`` (mean of the highest class probability).
    """
    real = _real_features(extractor, dataset, data_root)[: len(images)]
    fake, probabilities = extractor(images)
    few = slice(NEIGHBOUR_SAMPLES)
    # Ordered sets (classes one after the other) are shuffled before a part is taken.
    fake = fake[torch.randperm(len(fake), generator=torch.Generator().manual_seed(0))]
    highest = probabilities.amax(1)
    return {
        "frechet_distance": frechet_distance(real, fake),
        "kernel_distance": kernel_distance(real[few], fake[few]),
        **precision_recall(real[few], fake[few])._asdict(),
        "nearest_neighbour_accuracy": nearest_neighbour_test(real[few], fake[few]).accuracy,
        "confident": float((highest > 0.9).double().mean()),
        "confidence": float(highest.mean()),
    }


def _real_features(extractor: FeatureExtractor, dataset: str, data_root: str | os.PathLike | None) -> Tensor:
    """Features of the training images in a fixed random order; kept in the cache under the extractor's name."""
    train = load_dataset(dataset, data_root, image_size=28)
    path = extractor.cache / f"features-{extractor.name.replace(' ', '-')}-{train.fingerprint():08x}.pt"
    if path.is_file():
        return torch.load(path, weights_only=True)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:10_000]
    features, _ = extractor(train.images[order])
    torch.save(features, path)
    return features
