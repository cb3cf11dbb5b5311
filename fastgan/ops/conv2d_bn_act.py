"""Convolution [+ batch norm] + activation: the layer of a DCGAN discriminator."""

import torch
import torch.nn.functional as F

from fastgan import _extension
from fastgan._arguments import takes_tensor
from fastgan.ops._conv import activate, as_batch, batch_norm, check_activation, explicit_padding, group_arguments, group_obstacle, pair


@takes_tensor
def conv2d_bn_act(
    input, weight, bias=None, bn_weight=None, bn_bias=None, running_mean=None, running_var=None, *,
    stride=1, padding=0, dilation=1, groups=1, training=True, momentum=0.1, eps=1e-5,
    activation="leaky_relu", negative_slope=0.2, process_group=None,
):  # fmt: skip
    """``activation(batch_norm(conv2d(input)))`` as one operator.

    Beyond the convolution itself, batch statistics, normalisation and activation take one pass over its output in each
    direction. Only that output is saved for backward, never the activation's argument.

    Args:
        input: ``[N, C_in, H, W]`` or ``[C_in, H, W]``; float32, bfloat16, float16 or float64; any strides.
        weight: ``[C_out, C_in / groups, kH, kW]``, dtype of input.
        bias: ``[C_out]``, dtype of input.
        bn_weight, bn_bias: ``[C_out]``, scale and shift of batch norm; dtype of input, or float32 beside a lower
            precision input. None: 1 and 0.
        running_mean, running_var: ``[C_out]``, same dtypes. Updated in place when training (the variance unbiased);
            used for normalisation when not.
        stride, dilation: int or pair, at least 1.
        padding: int or pair, at least 0, or "same" or "valid".
        groups: divides C_in and C_out.
        training: normalise by the statistics of this batch (True) or by the running ones (False).
        momentum: weight of this batch in the running statistics.
        eps: added to the variance.
        activation: "relu", "leaky_relu", "tanh", "sigmoid" or "identity".
        negative_slope: of leaky_relu.
        process_group: a group of torch.distributed whose processes each hold a part of the batch, of any size: the
            statistics, also the running ones, are then those of the whole when training (one all-gather forward, one
            all-reduce backward). Gradients of weights are those of this process's part, to be summed or averaged over
            the processes as by DistributedDataParallel; only the first derivative exists then. On CUDA a layer
            with a group runs in plain PyTorch. None: this process's own statistics.

    Returns:
        ``[N, C_out, H_out, W_out]`` (no N for unbatched input) with the dtype of input and the memory format that
        ``F.conv2d`` gives. Under autocast the convolution's tensors are cast as ``F.conv2d``'s are; statistics stay
        float32.

    Derivatives of every order: the first by a fused kernel, higher ones through differentiable PyTorch operators.

    Raises:
        ValueError, TypeError, RuntimeError: naming the argument, what it must be and what came, for shapes, dtypes or
            devices that do not fit, one value per channel when training, or running statistics missing when not.
            Nothing is changed then.

    Batch normalisation: Ioffe and Szegedy 2015, algorithm 1. As discriminator layer: Radford et al. 2015, section 3.
    """
    op = "conv2d_bn_act"
    if isinstance(padding, str):
        input, padding = explicit_padding(op, input, weight, stride, padding, dilation)
    group = process_group if training else None
    run, group = (
        (torch.ops.fastgan.conv2d_bn_act, group_arguments(group))
        if _extension.runs_fused(op, input, group_obstacle(group, input.device))
        else (conv2d_bn_act_reference, {"process_group": group})
    )
    return run(
        input, weight, bias, bn_weight, bn_bias, running_mean, running_var,
        stride=pair(stride), padding=pair(padding), dilation=pair(dilation), groups=groups, training=training, momentum=momentum, eps=eps,
        activation=activation, negative_slope=negative_slope, **group,
    )  # fmt: skip


def conv2d_bn_act_reference(
    input, weight, bias=None, bn_weight=None, bn_bias=None, running_mean=None, running_var=None, *,
    stride=1, padding=0, dilation=1, groups=1, training=True, momentum=0.1, eps=1e-5,
    activation="leaky_relu", negative_slope=0.2, process_group=None,
):  # fmt: skip
    """conv2d_bn_act in plain PyTorch: the fallback where there are no kernels, and the tests' oracle."""
    check_activation("conv2d_bn_act", activation, negative_slope)
    y = F.conv2d(as_batch(input), weight, bias, stride, padding, dilation, groups)
    z = batch_norm(y, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps, process_group)
    output = activate("conv2d_bn_act", z, activation, negative_slope)
    return output[0] if input.dim() == 3 else output


@takes_tensor
def conv2d_act(
    input, weight, bias=None, *, stride=1, padding=0, dilation=1, groups=1, activation="leaky_relu", negative_slope=0.2
):
    """``activation(conv2d(input))`` as one operator.

    The activation is applied in place on the convolution's output, and its derivative is taken from that output, so
    only the input, the weight and the result are kept for backward.

    Args:
        input: ``[N, C_in, H, W]`` or ``[C_in, H, W]``; float32, bfloat16, float16 or float64; any strides.
        weight: ``[C_out, C_in / groups, kH, kW]``, dtype of input.
        bias: ``[C_out]``, dtype of input.
        stride, dilation: int or pair, at least 1.
        padding: int or pair, at least 0, or "same" or "valid".
        groups: divides C_in and C_out.
        activation: "relu", "leaky_relu", "tanh", "sigmoid" or "identity".
        negative_slope: of leaky_relu; below 0 PyTorch's own operators run, but for the layers that fastgan has loops of its own
            for (:func:`fastgan.explain` says which).

    Returns:
        ``[N, C_out, H_out, W_out]`` (no N for unbatched input), dtype of input.

    Derivatives of every order: the first by a fused kernel, higher ones through differentiable PyTorch operators.

    Raises:
        ValueError, TypeError, RuntimeError: naming the argument, what it must be and what came, for shapes, dtypes or
            devices that do not fit.
    """
    op = "conv2d_act"
    if isinstance(padding, str):
        input, padding = explicit_padding(op, input, weight, stride, padding, dilation)
    run = torch.ops.fastgan.conv2d_act if _extension.runs_fused(op, input) else conv2d_act_reference
    return run(
        input, weight, bias, stride=pair(stride), padding=pair(padding), dilation=pair(dilation), groups=groups,
        activation=activation, negative_slope=negative_slope,
    )  # fmt: skip


def conv2d_act_reference(
    input, weight, bias=None, *, stride=1, padding=0, dilation=1, groups=1, activation="leaky_relu", negative_slope=0.2
):
    """conv2d_act in plain PyTorch: the fallback where there are no kernels, and the tests' oracle."""
    y = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    return activate("conv2d_act", y, activation, negative_slope)
