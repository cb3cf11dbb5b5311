"""Modules over the fused operators, fuse() for other networks, and fold_batch_norm() for trained ones."""

from fastgan.nn.fold import fold_batch_norm
from fastgan.nn.fuse import fuse
from fastgan.nn.modules import ConvBNAct2d, ConvTransposeBNAct2d, GaussianNoise
from fastgan.nn.report import Fusion, FusionReport
from fastgan.nn.sync_batch_norm import SyncBatchNorm, convert_sync_batch_norm

__all__ = [
    "ConvBNAct2d", "ConvTransposeBNAct2d", "Fusion", "FusionReport", "GaussianNoise", "SyncBatchNorm",
    "convert_sync_batch_norm", "fold_batch_norm", "fuse",
]
