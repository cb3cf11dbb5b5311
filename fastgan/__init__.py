"""Fused C++/CUDA kernels of PyTorch for training GANs."""

from fastgan import nn, ops
from fastgan._extension import build_info
from fastgan.nn import fuse

__all__ = ["build_info", "fuse", "nn", "ops"]
