"""Modules over the fused operators, and fuse()."""

from fastgan.nn.fuse import fuse
from fastgan.nn.modules import ConvBNAct2d, ConvTransposeBNAct2d, GaussianNoise
from fastgan.nn.sync_batch_norm import SyncBatchNorm, convert_sync_batch_norm

__all__ = [
    "ConvBNAct2d", "ConvTransposeBNAct2d", "GaussianNoise", "SyncBatchNorm", "convert_sync_batch_norm", "fuse",
]
