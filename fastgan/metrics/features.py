"""The built-in feature extractor: a LeNet with a fixed seed, trained once on the data set and kept in the cache.

Its scores name it by hash: they compare generators of one data set with each other and with held-out images, and
are never to be put beside Inception scores.
"""

import dataclasses
import hashlib
import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgan.data import Batches, ImageDataset, load_dataset, normalize
from fastgan.train.checkpoint import save_checkpoint

EPOCHS = {"digits": 12, "mnist": 6, "fashion-mnist": 8}


class LeNet(nn.Module):
    """Images [N, 1, 28, 28] in [-1, 1] to logits [N, classes].

    Args:
        classes: that it tells apart.
    """

    def __init__(self, classes: int):
        super().__init__()
        self.hidden = nn.Sequential(
            nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(16),
            nn.Conv2d(16, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(32),
            nn.Flatten(), nn.Dropout(0.3), nn.Linear(32 * 49, 128), nn.ReLU(),
        )
        self.output = nn.Linear(128, classes)

    def features(self, images: Tensor) -> Tensor:
        """The 128 hidden units, [N, 128], of images [N, 1, 28, 28]."""
        return self.hidden(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.output(self.hidden(images))


@dataclasses.dataclass(frozen=True)
class FeatureExtractor:
    """A trained LeNet.

    Attributes:
        network: in eval mode, on the CPU.
        accuracy: on the test images of its data set, 0 to 1.
        name: data set and hash of the weights, to be stated beside every score.
        cache: folder it is kept in.
    """

    network: LeNet
    accuracy: float
    name: str
    cache: Path

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features [N, 128] and class probabilities [N, classes] of images [N, C, H, W].

        uint8 images run from 0 to 255, floating-point ones from -1 to 1; other sizes than 28 pixels are
        resized (32-pixel images of the MNIST family lose their border), channels are averaged.
        """
        features, probabilities = [], []
        for part in images.split(1000):
            part = normalize(part) if part.dtype == torch.uint8 else part.float()
            part = part.mean(1, keepdim=True)
            if part.shape[-1] == 32:
                part = part[:, :, 2:-2, 2:-2]
            elif part.shape[-1] != 28:
                part = F.interpolate(part, (28, 28), mode="bilinear", antialias=True)
            hidden = self.network.features(part)
            features.append(hidden)
            probabilities.append(self.network.output(hidden).softmax(1))
        return torch.cat(features), torch.cat(probabilities)


def feature_extractor(dataset: str = "digits", data_root: str | os.PathLike | None = None) -> FeatureExtractor:
    """The extractor of a labelled data set: from the cache, or trained now (60,000 images take two minutes of one core).

    Args:
        dataset: ``"digits"``, ``"mnist"`` or ``"fashion-mnist"``.
        data_root: where the data files are, as for :func:`fastgan.data.load_dataset`.

    Returns:
        The extractor; the same data give the same one.

    Raises:
        ValueError: a data set without labels.
        DataError: data that is missing or damaged.
    """
    if dataset not in EPOCHS:
        raise ValueError(f"feature_extractor: dataset must be one of {', '.join(EPOCHS)}, got {dataset!r}")
    train = load_dataset(dataset, data_root, image_size=28)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fastgan"
    path = cache / f"lenet-{dataset}-{train.fingerprint():08x}.pt"
    network = LeNet(int(train.labels.max()) + 1)
    if path.is_file():
        state = torch.load(path, weights_only=True)
        network.load_state_dict(state["network"])
        accuracy = state["accuracy"]
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = LeNet(int(train.labels.max()) + 1)
            _train(network, train, EPOCHS[dataset])
        accuracy = _accuracy(network, load_dataset(dataset, data_root, image_size=28, split="test"))
        cache.mkdir(parents=True, exist_ok=True)
        save_checkpoint(path, {"network": network.state_dict(), "accuracy": accuracy})
    digest = hashlib.sha256(b"".join(value.numpy().tobytes() for value in network.state_dict().values()))
    return FeatureExtractor(network.eval(), accuracy, f"LeNet {dataset} {digest.hexdigest()[:12]}", cache)


def _train(network: LeNet, dataset: ImageDataset, epochs: int) -> None:
    batches = Batches(dataset, 128, seed=0)
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, epochs * len(batches))
    network.train()
    for epoch in range(epochs):
        for images, labels in batches.epoch(epoch):
            # Shifted by up to two pixels: 10,000 digits alone do not make 99%.
            rows, columns = torch.randint(0, 5, (2,)).tolist()
            images = F.pad(images, (2, 2, 2, 2), value=-1)[:, :, rows : rows + 28, columns : columns + 28]
            loss = F.cross_entropy(network(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def _accuracy(network: LeNet, dataset: ImageDataset) -> float:
    network.eval()
    predicted = torch.cat([network(normalize(part)).argmax(1) for part in dataset.images.split(1000)])
    return float((predicted == dataset.labels).double().mean())
