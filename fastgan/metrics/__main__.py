"""`python -m fastgan.metrics CHECKPOINT ...` scores generators beside held-out images of the same data set."""

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from fastgan.data import DATASETS, load_dataset
from fastgan.metrics.distances import appearance
from fastgan.metrics.features import Extractor, load_extractor
from fastgan.metrics.generator import CHUNK, generate, real_features, save_nearest, score
from fastgan.train import DCGANConfig, GANConfig, TrainingError
from fastgan.train.checkpoint import load_checkpoint

FAMILIES = {config.family: config for config in (DCGANConfig, GANConfig)}


def main() -> int:
    parser = argparse.ArgumentParser(description="Score generators beside held-out images; a line of JSON each.")
    parser.add_argument("scored", nargs="*", metavar="CHECKPOINT", help="of a generator, or a folder of images")
    parser.add_argument("--family", choices=FAMILIES, default="dcgan", help="model family (default: dcgan)")
    parser.add_argument("--dataset", choices=DATASETS, default="digits", help="the real images (default: digits)")
    parser.add_argument("--data-root", metavar="DIR", help="folder of the data files, or of the images for 'folder'")
    parser.add_argument("--image-size", type=int, default=64, metavar="INT", help="of images in folders (default: 64)")
    parser.add_argument("--features", default="lenet", metavar="NAME", help="lenet, trained on the data set; random, "
                        "for any images; or a TorchScript file (default: lenet)")
    parser.add_argument("--samples", type=int, default=10_000, metavar="INT", help="images drawn (default: 10000)")
    parser.add_argument("--nearest", action="store_true", help="draw the nearest training image beside each sample, "
                        "into a picture beside the checkpoint")
    parser.add_argument("--threads", type=int, metavar="INT", help="CPU threads; by default PyTorch's choice")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        _score_all(arguments)
    except (ValueError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _score_all(arguments: argparse.Namespace) -> None:
    extractor = load_extractor(arguments.features, arguments.dataset, arguments.data_root)
    print(json.dumps({"extractor": extractor.name, "test_accuracy": extractor.accuracy}), flush=True)
    size = arguments.image_size if arguments.dataset == "folder" else 28
    real = real_features(extractor, load_dataset(arguments.dataset, arguments.data_root, image_size=size))
    if arguments.dataset != "folder":
        test = load_dataset(arguments.dataset, arguments.data_root, image_size=size, split="test")
        _print("held-out images", score(extractor, real, test.images[: arguments.samples]))
    for path in map(Path, arguments.scored):
        if path.is_dir():
            images = load_dataset("folder", path, image_size=arguments.image_size).images[: arguments.samples]
            _print(str(path), score(extractor, real, images))
            continue
        config_class = FAMILIES[arguments.family]
        images = generate(config_class, path, arguments.samples)
        figures = score(extractor, real, images)
        config = config_class(**load_checkpoint(path, arguments.family)["config"] | {"device": "cpu"})
        if arguments.family == "gan":
            if extractor.accuracy is not None:
                figures["intended_digit"] = _intended(extractor, images, config.digit)
            figures |= appearance(images)._asdict()
        if arguments.nearest:
            figures |= save_nearest(path.with_suffix(".nearest.png"), images[:CHUNK], config.load_data())
        _print(str(path), figures)


def _print(name: str, figures: dict) -> None:
    print(json.dumps({"of": name} | figures), flush=True)


def _intended(extractor: Extractor, images: Tensor, digit: int | None) -> list[float]:
    """Part of the images of each class that the classifier takes for it."""
    predicted = extractor(images)[1].argmax(1)
    if digit is not None:
        return [float((predicted == digit).double().mean())]
    by_class = predicted.view(-1, 10, CHUNK // 10)
    return [float((by_class[:, label] == label).double().mean()) for label in range(10)]


if __name__ == "__main__":
    sys.exit(main())
