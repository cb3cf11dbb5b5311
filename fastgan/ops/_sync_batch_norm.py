"""Batch norm over the processes of a torch.distributed group, in plain PyTorch."""

from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable
from torch.nn.modules._functions import SyncBatchNorm as CudaSyncBatchNorm

from fastgan.ops._dtypes import sums_dtype


def sync_batch_norm(
    y: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    momentum: float, eps: float, process_group: Any,
) -> Tensor:  # fmt: skip
    """``F.batch_norm`` in training mode with the statistics of all processes' batches, which may differ in size.

    Args:
        y: this process's part, [N, C, ...].
        running_mean, running_var: [C], updated with the statistics of all; or None.
        weight, bias: [C] or None. Their gradients are this process's, as those of every other parameter.
        process_group: a group of torch.distributed.

    Returns:
        [N, C, ...], dtype of y. Differentiable once.
    """
    if y.is_cuda:
        y = y if y.is_contiguous(memory_format=torch.channels_last) else y.contiguous()
        size = distributed.get_world_size(process_group)
        return CudaSyncBatchNorm.apply(y, weight, bias, running_mean, running_var, eps, momentum, process_group, size)
    return _SyncBatchNorm.apply(y, weight, bias, running_mean, running_var, momentum, eps, process_group)


class _SyncBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, weight, bias, running_mean, running_var, momentum, eps, process_group):
        dims = [dim for dim in range(y.dim()) if dim != 1]
        x = y.to(sums_dtype(y))
        count = x.numel() // x.shape[1]
        mean, var = (x.mean(dims), x.var(dims, correction=0)) if count else (x.new_zeros(x.shape[1]),) * 2
        row = torch.cat([mean, var, x.new_tensor([count])])
        rows = [torch.empty_like(row) for _ in range(distributed.get_world_size(process_group))]
        distributed.all_gather(rows, row, process_group)
        means, variances, counts = torch.stack(rows).double().split([len(mean), len(var), 1], 1)
        total = counts.sum()
        if total == 1:
            raise ValueError("sync_batch_norm: y must give more than one value per channel in all processes, got one")
        whole = (counts * means).sum(0) / total.clamp_min(1)
        variance = (counts * (variances + (means - whole).square())).sum(0) / total.clamp_min(1)
        if running_mean is not None and total > 0:
            running_mean.copy_(torch.lerp(running_mean.double(), whole, momentum))
            running_var.copy_(torch.lerp(running_var.double(), variance * total / (total - 1), momentum))
        invstd = (variance + eps).rsqrt().to(x.dtype)
        mean = whole.to(x.dtype)
        ctx.save_for_backward(y, weight, mean, invstd)
        ctx.total, ctx.process_group, ctx.bias_dtype = max(1.0, float(total)), process_group, None if bias is None else bias.dtype
        z = (x - _channels(mean, x)) * _channels(invstd, x)
        if weight is not None:
            z = z * _channels(weight, x)
        if bias is not None:
            z = z + _channels(bias, x)
        return z.to(y.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        y, weight, mean, invstd = ctx.saved_tensors
        dims = [dim for dim in range(y.dim()) if dim != 1]
        dz = grad_output.to(mean.dtype)
        xhat = (y.to(mean.dtype) - _channels(mean, y)) * _channels(invstd, y)
        own = torch.stack([dz.sum(dims), (dz * xhat).sum(dims)])
        sums = own.clone()
        distributed.all_reduce(sums, group=ctx.process_group)
        scale = invstd if weight is None else invstd * weight
        dy = _channels(scale, y) * (dz - _channels(sums[0] / ctx.total, y) - xhat * _channels(sums[1] / ctx.total, y))
        grad_weight = None if weight is None else own[1].to(weight.dtype)
        grad_bias = None if ctx.bias_dtype is None else own[0].to(ctx.bias_dtype)
        return dy.to(y.dtype), grad_weight, grad_bias, None, None, None, None, None


def _channels(array: Tensor, like: Tensor) -> Tensor:
    """[C] as [1, C, 1, ...]."""
    return array.view(1, -1, *(1,) * (like.dim() - 2))
