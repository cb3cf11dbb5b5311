"""Fused C++/CUDA kernels of PyTorch for training GANs."""

from fastgan import _source_folder  # noqa: F401  first: it may redirect the imports below

from fastgan import nn, ops
from fastgan._explain import explain
from fastgan._extension import build_info
from fastgan.nn import fuse

__all__ = ["build_info", "explain", "fuse", "nn", "ops"]
