"""The trainer: one loop for every model family, configured by a dataclass."""

from fastgan.train.catgan import CatGANConfig
from fastgan.train.checkpoint import TrainingError
from fastgan.train.command import run
from fastgan.train.config import TrainConfig, option
from fastgan.train.dcgan import DCGANConfig
from fastgan.train.gan import GANConfig
from fastgan.train.trainer import Objective, Trainer

__all__ = [
    "CatGANConfig", "DCGANConfig", "GANConfig", "Objective", "TrainConfig", "Trainer", "TrainingError", "option", "run",
]
