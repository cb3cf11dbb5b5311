"""Feature extractors: what the distances between sets of images are measured in.

An extractor is called with images [N, C, H, W] and gives features [N, D] and class probabilities [N, K], or None for
an extractor that knows no classes. It has a ``name`` that is stated beside every score, with a hash of its weights;
scores from different extractors, and Inception scores among them, are never to be put beside each other.

Three are here: a LeNet with a fixed seed, trained once on a labelled data set; random convolutions, for images of any
kind; and any TorchScript file, such as an Inception network.
"""

import dataclasses
import hashlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgan.data import Batches, ImageDataset, load_dataset, normalize
from fastgan.train.checkpoint import save_checkpoint

EPOCHS = {"digits": 12, "mnist": 6, "fashion-mnist": 8}


class Extractor:
    """What the functions of this package ask of a feature extractor; one of your own may inherit from it.

    Attributes:
        name: stated beside every score; the cache of real features goes by it.
        accuracy: on test images, 0 to 1; None without classes.
    """

    name: str
    accuracy: float | None

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features [N, D], and class probabilities [N, K] or None, of images [N, C, H, W]."""
        raise NotImplementedError


def cache_folder() -> Path:
    """Where trained extractors and real features are kept.

    Returns:
        ``$XDG_CACHE_HOME/fastgan``, or ``~/.cache/fastgan``.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fastgan"


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
class FeatureExtractor(Extractor):
    """A trained LeNet.

    Attributes:
        network: in eval mode, on the CPU.
        accuracy: on the test images of its data set, 0 to 1.
        name: data set and hash of the weights, to be stated beside every score.
    """

    network: LeNet
    accuracy: float
    name: str

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features [N, 128] and class probabilities [N, classes] of images [N, C, H, W].

        uint8 images run from 0 to 255, floating-point ones from -1 to 1; other sizes than 28 pixels are
        resized (32-pixel images of the MNIST family lose their border), channels are averaged.
        """
        features, probabilities = [], []
        for part in images.split(1000):
            part = _as_floats(part).mean(1, keepdim=True)
            if part.shape[-1] == 32:
                part = part[:, :, 2:-2, 2:-2]
            elif part.shape[-1] != 28:
                part = F.interpolate(part, (28, 28), mode="bilinear", antialias=True)
            hidden = self.network.features(part)
            features.append(hidden)
            probabilities.append(self.network.output(hidden).softmax(1))
        return torch.cat(features), torch.cat(probabilities)


class RandomExtractor(Extractor):
    """Convolutions with random weights of a fixed seed: features of images of any kind, without labels.

    Naeem et al. 2020 (arXiv 2002.09797) found random networks the fairer choice for images unlike those that a
    trained one has seen. Images are brought to 64 x 64 RGB; features [N, 448] are the mean activations of three
    layers, the last one in each quarter of the image.

    Args:
        seed: of the weights.
    """

    accuracy = None

    def __init__(self, seed: int = 0):
        random = torch.Generator().manual_seed(seed)
        widths = (3, 64, 128, 64)
        self.weights = [
            torch.randn(out, into, 3, 3, generator=random) * (2 / (9 * into)) ** 0.5
            for into, out in zip(widths, widths[1:])
        ]
        self.name = f"random {_digest(self.weights)}"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, None]:
        """Features of images [N, 1 or 3, H, W], uint8 or floating point in [-1, 1]."""
        features = []
        for part in images.split(200):
            activations = F.interpolate(_as_rgb(_as_floats(part)), (64, 64), mode="bilinear", antialias=True)
            means = []
            for weight in self.weights:
                activations = F.conv2d(activations, weight, stride=2, padding=1).relu()
                means.append(activations.mean((2, 3)))
            means[-1] = F.adaptive_avg_pool2d(activations, 2).flatten(1)
            features.append(torch.cat(means, 1))
        return torch.cat(features), None


class ScriptedExtractor(Extractor):
    """Features by a TorchScript file, such as the published Inception networks for Fréchet distances.

    The network gets uint8 images [N, 3, H, W] and returns features [N, D]. One that has an argument
    ``return_features``, as the Inception file of StyleGAN2-ADA has, is called with it set.

    Args:
        path: the file.

    Raises:
        ValueError: no TorchScript file.
    """

    accuracy = None

    def __init__(self, path: str | os.PathLike):
        try:
            content = Path(path).read_bytes()
            self.network = torch.jit.load(str(path), map_location="cpu").eval()
        except (OSError, RuntimeError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ValueError(f"--features {path}: cannot be read as a TorchScript file ({reason})") from error
        arguments = [argument.name for argument in self.network.forward.schema.arguments]
        self.options = {"return_features": True} if "return_features" in arguments else {}
        self.name = f"{Path(path).stem} {hashlib.sha256(content).hexdigest()[:12]}"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, None]:
        """Features of images [N, 1 or 3, H, W], uint8 or floating point in [-1, 1]."""
        parts = []
        for part in images.split(50):
            part = _as_rgb(part)
            if part.dtype != torch.uint8:
                part = ((part + 1) * 127.5).round().clamp(0, 255).byte()
            features = self.network(part, **self.options)
            if not isinstance(features, Tensor) or features.dim() != 2 or len(features) != len(part):
                found = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
                raise ValueError(f"--features: the network must return features [{len(part)}, D], got {found}")
            parts.append(features.float())
        return torch.cat(parts), None


def load_extractor(features: str, dataset: str, data_root: str | os.PathLike | None = None) -> Extractor:
    """An extractor by name.

    Args:
        features: ``"lenet"`` (see :func:`feature_extractor`), ``"random"`` (:class:`RandomExtractor`) or the path of a
            TorchScript file (:class:`ScriptedExtractor`).
        dataset: the data set a LeNet learns.
        data_root: where its files are.

    Returns:
        The extractor, ready to be called.

    Raises:
        ValueError: a data set without labels for a LeNet, or a file that is no network.
        DataError: data that is missing or damaged.
    """
    if features == "lenet":
        return feature_extractor(dataset, data_root)
    return RandomExtractor() if features == "random" else ScriptedExtractor(features)


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
        raise ValueError(f"feature_extractor: dataset must be one of {', '.join(EPOCHS)}, got {dataset!r}; "
                         "for other images there is --features random")
    train = load_dataset(dataset, data_root, image_size=28)
    path = cache_folder() / f"lenet-{dataset}-{train.fingerprint():08x}.pt"
    network = LeNet(int(train.labels.max()) + 1)
    if path.is_file():
        state = torch.load(path, weights_only=True)
        network.load_state_dict(state["network"])
        accuracy = state["accuracy"]
    else:
        print(f"training a classifier for {dataset}, once: a minute or two ({path})", file=sys.stderr)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = LeNet(int(train.labels.max()) + 1)
            _train(network, train, EPOCHS[dataset])
        accuracy = _accuracy(network, load_dataset(dataset, data_root, image_size=28, split="test"))
        path.parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint(path, {"network": network.state_dict(), "accuracy": accuracy})
    return FeatureExtractor(network.eval(), accuracy, f"LeNet {dataset} {_digest(network.state_dict().values())}")


def _digest(weights: Iterable[Tensor]) -> str:
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in weights)).hexdigest()[:12]


def _as_floats(images: Tensor) -> Tensor:
    return normalize(images) if images.dtype == torch.uint8 else images.float()


def _as_rgb(images: Tensor) -> Tensor:
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


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
