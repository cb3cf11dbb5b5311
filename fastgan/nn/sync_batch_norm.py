"""Batch norm whose statistics are those of all processes of a run."""

import contextlib
from typing import Any

import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastgan.nn._switch import Switch
from fastgan.ops._sync_batch_norm import sync_batch_norm

_own_statistics = Switch()
_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class SyncBatchNorm(_BatchNorm):
    """Like torch.nn.SyncBatchNorm, but on the CPU too; made by :func:`convert_sync_batch_norm`.

    It does not inherit from PyTorch's layer, because DistributedDataParallel refuses that one on the CPU.
    """

    process_group: Any

    def forward(self, input: Tensor) -> Tensor:
        group = synchronizing_group(self)
        uses_batch = self.training or (self.running_mean is None and self.running_var is None)
        tracks = not self.training or self.track_running_stats
        running = (self.running_mean, self.running_var) if tracks else (None, None)
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # cumulative average
                momentum = 1.0 / float(self.num_batches_tracked)
        if group is None:
            return F.batch_norm(input, *running, self.weight, self.bias, uses_batch, momentum, self.eps)
        return sync_batch_norm(input, *running, self.weight, self.bias, momentum, self.eps, group)


def convert_sync_batch_norm(module: nn.Module, process_group: Any = None) -> nn.Module:
    """Turn every BatchNorm layer of a module into a :class:`SyncBatchNorm` with the same parameters and buffers.

    In place of ``torch.nn.SyncBatchNorm.convert_sync_batchnorm``, whose layers run on GPUs only.

    Args:
        module: changed in place; subclasses of PyTorch's layers are left alone.
        process_group: whose statistics are taken; None for all processes.

    Returns:
        The module.
    """
    for child in module.modules():
        if type(child) in _PLAIN:
            child.__class__, child.process_group = SyncBatchNorm, process_group
    return module


def own_statistics() -> contextlib.AbstractContextManager[None]:
    """Inside, :class:`SyncBatchNorm` and fused layers take the statistics of this process alone: for what the others
    do not take part in, such as an evaluation."""
    return _own_statistics.on()


def synchronizing_group(bn: nn.Module) -> Any:
    """The group whose statistics `bn` normalises by now, or None for this process's own."""
    if not isinstance(bn, (SyncBatchNorm, nn.SyncBatchNorm)) or not bn.training or _own_statistics.is_on:
        return None
    if not distributed.is_available() or not distributed.is_initialized():
        return None
    group = bn.process_group or distributed.group.WORLD
    return group if distributed.get_world_size(group) > 1 else None
