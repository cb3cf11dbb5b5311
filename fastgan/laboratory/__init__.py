"""The one-dimensional laboratory: GANs whose densities, distances and optimal discriminator can be computed."""

from fastgan.laboratory.experiment import LaboratoryConfig, Run, fit_discriminator, gradient_norms, train
from fastgan.laboratory.mixture import Mixture, distances
from fastgan.laboratory.command import run

__all__ = ["LaboratoryConfig", "Mixture", "Run", "distances", "fit_discriminator", "gradient_norms", "run", "train"]
