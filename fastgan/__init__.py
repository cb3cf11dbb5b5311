"""Fused C++/CUDA kernels for PyTorch that make training GANs faster."""

from fastgan._source_folder import installed_package_takes_over

if not installed_package_takes_over():
    from fastgan import losses, models, nn, ops, optim
    from fastgan._explain import explain
    from fastgan._extension import build_info
    from fastgan.nn import fuse

__all__ = ["build_info", "explain", "fuse", "losses", "models", "nn", "ops", "optim"]
