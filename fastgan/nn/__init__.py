"""Modules over the fused operators, and fuse()."""

from fastgan.nn.fuse import fuse
from fastgan.nn.modules import ConvBNAct2d, ConvTransposeBNAct2d, GaussianNoise

__all__ = ["ConvBNAct2d", "ConvTransposeBNAct2d", "GaussianNoise", "fuse"]
