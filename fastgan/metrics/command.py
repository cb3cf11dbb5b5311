"""`fastgan evaluate` scores generators beside held-out images of the same data set."""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from fastgan._arguments import set_threads
from fastgan.data import DATASETS, ImageDataset, load_dataset
from fastgan.metrics.distances import appearance
from fastgan.metrics.features import Extractor, load_extractor
from fastgan.metrics.generator import CHUNK, SCORED, generate, real_features, save_nearest, score
from fastgan.sample import load_generator
from fastgan.train.config import TrainConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("scored", nargs="*", metavar="PATH", help="a run's folder, its checkpoint.pt, or a folder of images")
    parser.add_argument("--dataset", choices=DATASETS, default="digits", help="the real images (default: digits)")
    parser.add_argument("--data-root", metavar="DIR", help="folder of the data files, or of the images for 'folder'")
    parser.add_argument("--image-size", type=int, default=64, metavar="INT", help="of images in folders (default: 64)")
    parser.add_argument("--features", default="lenet", metavar="NAME", help="lenet, trained on the data set; random, "
                        "for any images; or a TorchScript file (default: lenet)")
    parser.add_argument("--samples", type=int, default=10_000, metavar="INT", help="generated images to score (default: 10000)")
    parser.add_argument("--nearest", action="store_true", help="write a picture, next to the checkpoint, of each sample "
                        "and its nearest training image")
    parser.add_argument("--threads", type=int, metavar="INT", help="CPU threads; default: PyTorch's choice")


def run(options: argparse.Namespace) -> int:
    """Print a line of JSON for the extractor, the held-out images and each path."""
    for name, least in (("samples", SCORED), ("image_size", 1)):
        if (value := getattr(options, name)) < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    set_threads(options.threads)
    paths = [path / "checkpoint.pt" if (path / "checkpoint.pt").is_file() else path for path in map(Path, options.scored)]
    # Before minutes are spent on the extractor.
    loaded = {path: load_generator(path) for path in paths if not path.is_dir()}
    for path, (config, _) in loaded.items():
        if options.samples % config.side_by_side:
            networks = f"{config.side_by_side}, the networks side by side in {path}"
            raise ValueError(f"--samples must be a multiple of {networks}, got {options.samples}")
    extractor = load_extractor(options.features, options.dataset, options.data_root)
    print(json.dumps({"extractor": extractor.name, "test_accuracy": extractor.accuracy}), flush=True)
    size = options.image_size if options.dataset == "folder" else 28
    real = real_features(extractor, load_dataset(options.dataset, options.data_root, image_size=size))
    if options.dataset != "folder":
        test = load_dataset(options.dataset, options.data_root, image_size=size, split="test")
        _print("held-out images", score(extractor, real, test.images[: options.samples]))
    for path in paths:
        if path not in loaded:
            images = load_dataset("folder", path, image_size=options.image_size).images[: options.samples]
            _print(str(path), score(extractor, real, images))
            continue
        config, generator = loaded[path]
        images = generate(config, generator, options.samples)
        figures = score(extractor, real, images)
        if config.family == "gan":
            if extractor.accuracy is not None:
                figures["intended_digit"] = _intended(extractor, images, config.digit)
            figures |= appearance(images)._asdict()
        if options.nearest:
            figures |= save_nearest(path.with_suffix(".nearest.png"), images[:CHUNK], _learnt(config))
        _print(str(path), figures)
    return 0


def _print(name: str, figures: dict) -> None:
    print(json.dumps({"of": name} | figures), flush=True)


def _learnt(config: TrainConfig) -> ImageDataset:
    """The training images that the generator was to learn: of one digit, where it was one."""
    dataset = config.load_data()
    if (digit := getattr(config, "digit", None)) is None:
        return dataset
    chosen = dataset.labels == digit
    return ImageDataset(dataset.name, dataset.images[chosen], dataset.labels[chosen])


def _intended(extractor: Extractor, images: Tensor, digit: int | None) -> list[float]:
    """Part of the images of each class that the classifier takes for it."""
    predicted = extractor(images)[1].argmax(1)
    if digit is not None:
        return [float((predicted == digit).double().mean())]
    by_class = torch.cat([part.view(10, -1) for part in predicted.split(CHUNK)], 1)
    return [float((by_class[label] == label).double().mean()) for label in range(10)]
