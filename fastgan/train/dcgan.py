"""Training of the DCGAN."""

import dataclasses
from typing import ClassVar

from torch import nn

from fastgan.data import ImageDataset
from fastgan.models.dcgan import dcgan
from fastgan.train.augment import augment
from fastgan.train.config import TrainConfig, option
from fastgan.train.trainer import Objective


@dataclasses.dataclass(kw_only=True)
class DCGANConfig(TrainConfig):
    """Train a DCGAN (Radford et al. 2015) on a data set of images."""

    family: ClassVar[str] = "dcgan"

    base_channels: int = option(32, "channels of the layers next to the image; they double inwards", minimum=1)
    augment: bool = option(False, "change the images the discriminator sees, differentiably: for small sets")
    output: str = option("runs/dcgan", "folder the results are written to", may_change=True)

    def build(self, dataset: ImageDataset) -> tuple[nn.Module, nn.Module, Objective]:
        channels, height, _ = dataset.image_shape
        generator, discriminator = dcgan(height, channels, self.latent_dim, self.base_channels)
        return generator, discriminator, Objective(self.generator_loss, augment if self.augment else None)
