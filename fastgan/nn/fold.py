"""fold_batch_norm(): a trained network's batch norms go into the layers before them."""

import copy
from collections import Counter, OrderedDict

import torch
from torch import nn

from fastgan.nn._runs import is_plain
from fastgan.nn.fuse import FusedSequential, _users_class
from fastgan.nn.modules import ConvBNAct2d, ConvTransposeBNAct2d

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def fold_batch_norm(module: nn.Module) -> nn.Module:
    """A copy of a network for inference, in which no batch norm is left that could go into the layer before it.

    In every ``nn.Sequential``, at any depth, a convolution, transposed convolution or linear layer and the batch norm
    behind it become one layer with weight ``w * s`` and bias ``(b - mean) * s + beta``, where
    ``s = gamma / sqrt(var + eps)``; the layers behind it move up. Sequentials that :func:`fastgan.fuse` changed are
    plain ones in the copy, so that a Sequential of torch's layers needs torch alone.

    Args:
        module: the network. Linear layers must be given ``[N, features]``: there batch norm is of the features.

    Returns:
        A copy in eval mode, equal to the network in eval mode to rounding (the new weights are computed in float64).
        A batch norm stays where it is without running statistics, behind another kind of layer, or where either of
        the two layers has hooks, parametrizations or a second place in the network.

    Raises:
        TypeError: ``module`` is not an ``nn.Module``.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"fold_batch_norm: module must be a torch.nn.Module, got {type(module).__name__}")
    holder = nn.Sequential(copy.deepcopy(module))  # so that the network itself can be replaced too
    for parent in list(holder.modules()):
        for name, child in parent.named_children():
            if type(child) in (ConvBNAct2d, ConvTransposeBNAct2d) and is_plain(child):
                setattr(parent, name, child.plain())
    # Not children(), which gives a layer with two places once.
    places = Counter(id(child) for parent in holder.modules() for child in parent._modules.values())
    for sequential in list(holder.modules()):
        if isinstance(sequential, FusedSequential):
            sequential.__class__ = _users_class(sequential)
        if type(sequential) is nn.Sequential:
            _fold_sequential(sequential, places)
    return holder[0].eval()


def _fold_sequential(sequential: nn.Sequential, places: Counter) -> None:
    kept: list[tuple[str, nn.Module]] = []
    for name, child in sequential._modules.items():
        previous = kept[-1][1] if kept else None
        if previous is not None and _folds(previous, child) and places[id(previous)] == places[id(child)] == 1:
            _fold(previous, child)
        else:
            kept.append((name, child))
    numbered = all(name.isdecimal() for name, _ in kept)
    sequential._modules = OrderedDict(
        (str(number) if numbered else name, child) for number, (name, child) in enumerate(kept)
    )


def _folds(layer: nn.Module, norm: nn.Module) -> bool:
    return (
        type(layer) in _LAYERS
        and type(norm) in _NORMS
        and norm.running_mean is not None
        and norm.running_var is not None
        and is_plain(layer)
        and is_plain(norm)
    )


@torch.no_grad()
def _fold(layer: nn.Module, norm: nn.Module) -> None:
    """Changes the layer so that it does what layer and batch norm did."""
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    scale = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -mean * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    if layer.bias is not None:
        shift = shift + layer.bias.double() * scale
    weight = layer.weight.double()
    if isinstance(layer, _TRANSPOSED):  # [in, out / groups, ...]: the inputs of a group lie together
        groups = layer.groups
        spatial = (1,) * (weight.dim() - 2)
        weight = (weight.unflatten(0, (groups, -1)) * scale.view(groups, 1, -1, *spatial)).flatten(0, 1)
    else:
        weight = weight * scale.view(-1, *(1,) * (weight.dim() - 1))
    trains, dtype = layer.weight.requires_grad, layer.weight.dtype
    layer.weight = nn.Parameter(weight.to(dtype), trains)
    layer.bias = nn.Parameter(shift.to(dtype), trains)
