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
    decay: float = option(0.0, "last part of the run in which the step size falls linearly to 0; 0 for none", minimum=0)
    output: str = option("runs/dcgan", "folder the results are written to", may_change=True)

    def __post_init__(self):
        super().__post_init__()
        if self.decay > 1:
            raise ValueError(f"--decay must be at most 1, got {self.decay}")

    def learning_rate_at(self, progress: float) -> float:
        return self.learning_rate * (min(1.0, (1 - progress) / self.decay) if self.decay else 1.0)

    def build(self, dataset: ImageDataset) -> tuple[nn.Module, nn.Module, Objective]:
        channels, height, _ = dataset.image_shape
        generator, discriminator = dcgan(height, channels, self.latent_dim, self.base_channels)
        return generator, discriminator, Objective(self.generator_loss, augment if self.augment else None)
