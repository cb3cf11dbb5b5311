"""Training of the DCGAN."""

import dataclasses
from typing import ClassVar

from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from fastgan.data import ImageDataset
from fastgan.models.dcgan import DISCRIMINATOR_NORMALIZATIONS, dcgan
from fastgan.train.augment import augment
from fastgan.train.config import AdversarialConfig, LinearDecay, option
from fastgan.train.trainer import Objective


@dataclasses.dataclass(kw_only=True)
class DCGANConfig(LinearDecay, AdversarialConfig):
    """Train a DCGAN (Radford et al. 2015) on a data set of images."""

    family: ClassVar[str] = "dcgan"

    base_channels: int = option(32, "channels of the layers next to the image; they double inwards", minimum=1)
    discriminator_normalization: str | None = option(
        None, "normalisation in the discriminator; default: batch norm, but layer norm with --gradient-penalty and none "
        "with --spectral-norm", choices=tuple(DISCRIMINATOR_NORMALIZATIONS))
    spectral_norm: bool = option(False, "hold the largest singular value of the discriminator's weights at 1 "
                                 "(Miyato et al. 2018)")
    discriminator_steps: int = option(1, "discriminator updates per generator update, each on a new batch "
                                      "(WGAN-GP: 5)", minimum=1)
    augment: bool = option(False, "differentiable augmentation of what the discriminator sees, for small data sets")
    decay: float = option(0.0, "final fraction (0 to 1) of the run over which the learning rate falls linearly to 0; 0 for none", minimum=0)
    output: str = option("runs/dcgan", "folder the results are written to", may_change=True)

    def __post_init__(self):
        super().__post_init__()
        if self.gradient_penalty and self.discriminator_normalization == "batch":
            raise ValueError(
                "--discriminator-normalization must be layer or none with --gradient-penalty, which is about each "
                "image by itself, got batch"
            )

    def build(self, dataset: ImageDataset) -> tuple[nn.Module, nn.Module, Objective]:
        channels, height, _ = self.image_shape_of(dataset)
        normalization = self.discriminator_normalization or (
            "layer" if self.gradient_penalty else "none" if self.spectral_norm else "batch"
        )
        generator, discriminator = dcgan(
            height, channels, self.latent_dim, self.base_channels, discriminator_normalization=normalization
        )
        if self.spectral_norm:
            for layer in discriminator.main:
                if isinstance(layer, nn.Conv2d):
                    spectral_norm(layer)
        objective = Objective(self.generator_loss, augment if self.augment else None, **self.discriminator_terms)
        return generator, discriminator, objective

    def build_generator(self) -> nn.Module:
        channels, height, _ = self.image_shape
        return dcgan(height, channels, self.latent_dim, self.base_channels)[0]
