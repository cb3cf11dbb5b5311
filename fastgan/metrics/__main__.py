"""`python -m fastgan.metrics CHECKPOINT ...` scores generators beside held-out images of the same data set."""

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from fastgan.data import load_dataset
from fastgan.metrics.distances import appearance
from fastgan.metrics.features import EPOCHS, FeatureExtractor, feature_extractor
from fastgan.metrics.generator import CHUNK, generate, score
from fastgan.train import DCGANConfig, GANConfig, TrainingError
from fastgan.train.checkpoint import load_checkpoint

FAMILIES = {config.family: config for config in (DCGANConfig, GANConfig)}


def main() -> int:
    parser = argparse.ArgumentParser(description="Score generators beside held-out images; a line of JSON each.")
    parser.add_argument("checkpoints", nargs="*", metavar="CHECKPOINT")
    parser.add_argument("--family", choices=FAMILIES, default="dcgan", help="model family (default: dcgan)")
    parser.add_argument("--dataset", choices=EPOCHS, default="digits", help="data set the extractor learns (default: digits)")
    parser.add_argument("--data-root", metavar="DIR", help="folder of the data files")
    parser.add_argument("--samples", type=int, default=10_000, metavar="INT", help="images drawn (default: 10000)")
    parser.add_argument("--threads", type=int, metavar="INT", help="CPU threads; by default PyTorch's choice")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        extractor = feature_extractor(arguments.dataset, arguments.data_root)
        print(json.dumps({"extractor": extractor.name, "test_accuracy": extractor.accuracy}))
        test = load_dataset(arguments.dataset, arguments.data_root, image_size=28, split="test")
        sets = {"held-out images": test.images[: arguments.samples]}
        for path in arguments.checkpoints:
            sets[path] = generate(FAMILIES[arguments.family], path, arguments.samples)
        for name, images in sets.items():
            figures = score(extractor, arguments.dataset, images, arguments.data_root)
            if name != "held-out images" and arguments.family == "gan":
                figures["intended_digit"] = _intended(extractor, images, load_checkpoint(Path(name), "gan")["config"]["digit"])
                figures |= appearance(images)._asdict()
            print(json.dumps({"of": name} | figures), flush=True)
    except (ValueError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _intended(extractor: FeatureExtractor, images: Tensor, digit: int | None) -> list[float]:
    """Part of the images of each class that the classifier takes for it."""
    predicted = extractor(images)[1].argmax(1)
    if digit is not None:
        return [float((predicted == digit).double().mean())]
    by_class = predicted.view(-1, 10, CHUNK // 10)
    return [float((by_class[:, label] == label).double().mean()) for label in range(10)]


if __name__ == "__main__":
    sys.exit(main())
