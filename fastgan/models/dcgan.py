"""Deep convolutional GAN (Radford, Metz and Chintala 2015, arXiv 1511.06434).

The five guidelines of the paper's section 3 shape both networks: strided convolutions instead of
pooling, batch normalisation everywhere but the generator's output and the discriminator's input, no
hidden fully connected layer, ReLU in the generator with tanh at its output, leaky ReLU in the
discriminator.
"""

import torch
from torch import nn

from fastgan._arguments import check_counts, check_integer

# Channel counts double with every halving of the image, up to this many times base_channels (512
# at the paper's 64): beyond it the two innermost layers of a large image would hold nearly all weights.
_WIDEST = 8

# What follows a convolution inside the discriminator. Layer norm is over all channels and pixels of an image.
DISCRIMINATOR_NORMALIZATIONS = {
    "batch": nn.BatchNorm2d,
    "layer": lambda channels: nn.GroupNorm(1, channels),
    "none": None,
}


class DCGANGenerator(nn.Module):
    """Latent vectors to images in [-1, 1]; built by :func:`dcgan`.

    The input is ``z`` of shape [N, latent_dim] or [N, latent_dim, 1, 1], the output has shape
    [N, channels, image_size, image_size].
    """

    def __init__(self, latent_dim: int, widths: list[int], start: int):
        super().__init__()
        self.latent_dim = latent_dim
        layers: list[nn.Module] = [nn.ConvTranspose2d(latent_dim, widths[0], start, 1, 0, bias=False)]
        for width, next_width in zip(widths, widths[1:]):
            layers += [
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
                nn.ConvTranspose2d(width, next_width, 4, 2, 1, bias=False),
            ]
        self.main = nn.Sequential(*layers, nn.Tanh())

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        if z.dim() not in (2, 4) or z.shape[1:].numel() != self.latent_dim:
            raise ValueError(
                f"DCGANGenerator: z must have shape [N, {self.latent_dim}] or "
                f"[N, {self.latent_dim}, 1, 1], got {list(z.shape)}"
            )
        return self.main(z.reshape(-1, self.latent_dim, 1, 1))


class DCGANDiscriminator(nn.Module):
    """Images to logits; built by :func:`dcgan`.

    The input has shape [N, channels, image_size, image_size], the output has shape [N] and holds
    logits: ``sigmoid(logit)`` is the probability that the image is real.
    """

    def __init__(self, image_size: int, widths: list[int], end: int, normalization: str = "batch"):
        super().__init__()
        normalize = DISCRIMINATOR_NORMALIZATIONS[normalization]
        bias = normalize is None  # without any, and leaky ReLUs, the logit would only scale with the image
        self.image_shape = (widths[0], image_size, image_size)
        layers: list[nn.Module] = []
        for i, (width, next_width) in enumerate(zip(widths, widths[1:])):
            layers.append(nn.Conv2d(width, next_width, 4, 2, 1, bias=bias))
            if i > 0 and normalize:
                layers.append(normalize(next_width))
            layers.append(nn.LeakyReLU(0.2, inplace=True))
        layers.append(nn.Conv2d(widths[-1], 1, end, 1, 0, bias=bias))
        self.main = nn.Sequential(*layers)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.dim() != 4 or images.shape[1:] != self.image_shape:
            raise ValueError(
                f"DCGANDiscriminator: images must have shape [N, {', '.join(map(str, self.image_shape))}], "
                f"got {list(images.shape)}"
            )
        return self.main(images).flatten()


def dcgan(
    image_size: int = 64,
    channels: int = 3,
    latent_dim: int = 100,
    base_channels: int = 64,
    *,
    discriminator_normalization: str = "batch",
) -> tuple[DCGANGenerator, DCGANDiscriminator]:
    """Build the two networks of a DCGAN, initialised as in the paper.

    Args:
        image_size: height and width of the images in pixels: 4 * 2**n, 28 or 48.
        channels: channels of an image, 1 for grey and 3 for RGB.
        latent_dim: length of the generator's input, drawn from N(0, 1).
        base_channels: channels of the layer next to the image; they double with every halving of the
            image, up to 8 * base_channels.
        discriminator_normalization: ``"batch"`` norm, the paper's; ``"layer"`` norm or ``"none"`` for a discriminator
            that judges each image by itself, as gradient penalties need it.

    Returns:
        ``(generator, discriminator)``. The generator maps z [N, latent_dim] or [N, latent_dim, 1, 1]
        to images [N, channels, image_size, image_size] in [-1, 1], the discriminator maps such images
        to logits [N].

    Convolution weights are drawn from N(0, 0.02), batch-norm scales from N(1, 0.02); batch-norm
    offsets start at 0, and so do the convolutions' biases, which only a discriminator without normalization has.

    Raises:
        ValueError: an image size that cannot be built, a count below 1, or an unknown normalization.
        TypeError: a size or count that is no integer.
    """
    check_counts("dcgan", channels=channels, latent_dim=latent_dim, base_channels=base_channels)
    if discriminator_normalization not in DISCRIMINATOR_NORMALIZATIONS:
        raise ValueError(
            f"dcgan: discriminator_normalization must be one of {', '.join(DISCRIMINATOR_NORMALIZATIONS)}, "
            f"got {discriminator_normalization!r}"
        )
    start, doublings = start_and_doublings("dcgan", image_size)
    widths = [channels] + [base_channels * min(2**i, _WIDEST) for i in range(doublings)]
    generator = DCGANGenerator(latent_dim, widths[::-1], start)
    discriminator = DCGANDiscriminator(image_size, widths, start, discriminator_normalization)
    generator.apply(_initialise)
    discriminator.apply(_initialise)
    return generator, discriminator


def start_and_doublings(function: str, image_size: int) -> tuple[int, int]:
    """Side of the innermost feature map, and how often it is doubled to reach ``image_size``; ``function`` asks for it."""
    check_integer(function, "image_size", image_size)
    image_size = int(image_size)
    if image_size == 28:
        return 7, 2
    if image_size == 48:
        return 6, 3
    if image_size >= 4 and image_size & (image_size - 1) == 0:
        return 4, image_size.bit_length() - 3
    powers = [4 * 2**n for n in range(max(image_size, 4).bit_length())]
    possible = sorted(powers + [28, 48])
    near = [size for size in possible if size < image_size][-1:] + [size for size in possible if size > image_size][:1]
    raise ValueError(
        f"{function}: image_size must be 4 * 2**n (4, 8, 16, 32, 64, 128, ...), 28 or 48, got {image_size}; "
        f"the nearest that work: {' and '.join(map(str, near))}"
    )


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
