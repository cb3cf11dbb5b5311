"""The model families by name."""

from fastgan.train.catgan import CatGANConfig
from fastgan.train.config import TrainConfig
from fastgan.train.dcgan import DCGANConfig
from fastgan.train.gan import GANConfig

FAMILIES: dict[str, type[TrainConfig]] = {config.family: config for config in (DCGANConfig, GANConfig, CatGANConfig)}
