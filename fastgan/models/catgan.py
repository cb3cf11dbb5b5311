"""Categorical GAN (Springenberg 2015, arXiv 1511.06390): the discriminator is a classifier.

It has one logit per category and none for "fake": it should be certain about real images and uncertain about generated
ones. Gaussian noise on its input and its hidden layers, in training only, keeps it from placing the category borders
arbitrarily between the training images.
"""

import torch
from torch import nn

from fastgan._arguments import check_counts, check_not_negative
from fastgan.models.dcgan import dcgan, start_and_doublings
from fastgan.nn import GaussianNoise
from fastgan.nn.fuse import FusedSequential

ARCHITECTURES = ("mlp", "conv")

_HIDDEN = (1000, 500, 250, 250, 250)  # the perceptron used for the permutation-invariant task
_GENERATOR_HIDDEN = (500, 500)
_DENSE = 128  # width of the convolutional classifier's hidden layer without convolution
_LARGEST_MAP = 8  # convolutions halve the image until its side is no longer than this
# Standard deviations of the noise on input (images in [-1, 1]) and hidden layers.
_NOISE = {"mlp": (0.6, 0.5), "conv": (0.2, 0.0)}


class CatGANClassifier(nn.Module):
    """Images [N, channels, image_size, image_size] in [-1, 1] to logits [N, num_classes]; built by :func:`catgan`."""

    def __init__(self, image_shape: tuple[int, int, int], body: nn.Sequential, width: int, num_classes: int):
        super().__init__()
        self.image_shape = image_shape
        self.body = body
        self.head = nn.Linear(width, num_classes)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """The last hidden layer, [N, F]."""
        return self.body(self._checked(images))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        images = self._checked(images)
        if isinstance(self.body, FusedSequential):
            return self.body.followed_by(self.head, images)
        return self.head(self.body(images))

    def _checked(self, images: torch.Tensor) -> torch.Tensor:
        if images.dim() != 4 or images.shape[1:] != self.image_shape:
            raise ValueError(
                f"CatGANClassifier: images must have shape [N, {', '.join(map(str, self.image_shape))}], "
                f"got {list(images.shape)}"
            )
        return images


class PerceptronGenerator(nn.Module):
    """Latent vectors [N, latent_dim] to images [N, channels, image_size, image_size] in [-1, 1]."""

    def __init__(self, latent_dim: int, image_shape: tuple[int, int, int]):
        super().__init__()
        self.latent_dim = latent_dim
        widths = (latent_dim, *_GENERATOR_HIDDEN)
        layers: list[nn.Module] = []
        for width, next_width in zip(widths, widths[1:]):
            layers += [nn.Linear(width, next_width, bias=False), nn.BatchNorm1d(next_width), nn.LeakyReLU(0.2)]
        pixels = torch.Size(image_shape).numel()
        self.main = nn.Sequential(*layers, nn.Linear(widths[-1], pixels), nn.Tanh(), nn.Unflatten(1, image_shape))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        if z.dim() != 2 or z.shape[1] != self.latent_dim:
            raise ValueError(
                f"PerceptronGenerator: z must have shape [N, {self.latent_dim}], got {list(z.shape)}"
            )
        return self.main(z)


def catgan(
    image_size: int = 28,
    channels: int = 1,
    num_classes: int = 10,
    latent_dim: int = 100,
    architecture: str = "mlp",
    *,
    base_channels: int = 32,
    input_noise: float | None = None,
    hidden_noise: float | None = None,
) -> tuple[nn.Module, CatGANClassifier]:
    """Build the two networks of a CatGAN, initialised for training.

    Give the perceptron real and generated images in one batch: batch norm of their own hides from it what all generated ones
    share.

    Args:
        image_size: height and width of the images in pixels; for ``"conv"`` 4 * 2**n, 28 or 48.
        channels: channels of an image, 1 for grey and 3 for RGB.
        num_classes: categories; more of them than classes help where there are no labels.
        latent_dim: length of the generator's input, drawn from N(0, 1).
        architecture: ``"mlp"``, the permutation-invariant perceptron: classifier 1000-500-250-250-250 with batch
            normalisation and leaky ReLU, generator 500-500; or ``"conv"``: strided convolutions (4 x 4, stride 2)
            down to a map of at most 8 x 8 and a layer of 128 units, the generator of a DCGAN.
        base_channels: of ``"conv"``: channels of the layer next to the image; they double with every halving.
        input_noise: standard deviation of the noise on the images, in training mode; None for 0.6 with ``"mlp"``,
            0.2 with ``"conv"``.
        hidden_noise: standard deviation of the noise on the hidden layers, in training mode; None for 0.5 with
            ``"mlp"``, 0 with ``"conv"``.

    Returns:
        ``(generator, classifier)``. The generator maps z [N, latent_dim] to images [N, channels, image_size,
        image_size] in [-1, 1], the classifier maps such images to logits [N, num_classes].

    Raises:
        ValueError: an unknown architecture, an image size that cannot be built, a count below 1 or noise below 0.
        TypeError: a size or count that is no integer, noise that is no number.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"catgan: architecture must be one of {', '.join(ARCHITECTURES)}, got {architecture!r}")
    check_counts("catgan", image_size=image_size, channels=channels, num_classes=num_classes, latent_dim=latent_dim,
                 base_channels=base_channels)
    noise = [given if given is not None else default
             for given, default in zip((input_noise, hidden_noise), _NOISE[architecture])]
    check_not_negative("catgan", input_noise=noise[0], hidden_noise=noise[1])
    shape = (channels, image_size, image_size)
    if architecture == "mlp":
        return PerceptronGenerator(latent_dim, shape), _perceptron(shape, num_classes, *noise)
    start_and_doublings("catgan", image_size)
    generator, _ = dcgan(image_size, channels, latent_dim, base_channels)
    return generator, _convolutional(shape, num_classes, base_channels, *noise)


def _perceptron(shape: tuple[int, int, int], num_classes: int, input_noise: float, noise: float) -> CatGANClassifier:
    layers: list[nn.Module] = [nn.Flatten(), GaussianNoise(input_noise)]
    width = torch.Size(shape).numel()
    for next_width in _HIDDEN:
        layers += _hidden(nn.Linear(width, next_width, bias=False), nn.BatchNorm1d(next_width), noise)
        width = next_width
    return CatGANClassifier(shape, nn.Sequential(*layers), width, num_classes)


def _convolutional(
    shape: tuple[int, int, int], num_classes: int, base_channels: int, input_noise: float, noise: float
) -> CatGANClassifier:
    channels, side, _ = shape
    next_channels = base_channels
    layers: list[nn.Module] = [GaussianNoise(input_noise)]
    while side > _LARGEST_MAP:
        convolution = nn.Conv2d(channels, next_channels, 4, 2, 1, bias=False)
        layers += _hidden(convolution, nn.BatchNorm2d(next_channels), noise)
        channels, next_channels, side = next_channels, 2 * next_channels, side // 2
    dense = nn.Linear(channels * side * side, _DENSE, bias=False)
    layers += [nn.Flatten(), *_hidden(dense, nn.BatchNorm1d(_DENSE), noise)]
    return CatGANClassifier(shape, nn.Sequential(*layers), _DENSE, num_classes)


def _hidden(weights: nn.Module, norm: nn.Module, noise: float) -> list[nn.Module]:
    return [weights, norm, nn.LeakyReLU(0.2)] + ([GaussianNoise(noise)] if noise else [])
