"""The model families: each function returns its pair of networks, initialised for training."""

from fastgan.models.catgan import catgan
from fastgan.models.dcgan import dcgan
from fastgan.models.gan import mlp_gan

__all__ = ["catgan", "dcgan", "mlp_gan"]
