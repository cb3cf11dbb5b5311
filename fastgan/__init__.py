"""Fused C++/CUDA kernels of PyTorch for training GANs."""

from fastgan import ops
from fastgan._extension import build_info

__all__ = ["build_info", "ops"]
