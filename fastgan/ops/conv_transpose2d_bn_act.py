"""Transposed convolution [+ batch norm] + activation: the layer of a DCGAN generator."""

import torch
import torch.nn.functional as F

from fastgan import _extension
from fastgan._arguments import takes_tensor
from fastgan.ops._conv import activate, as_batch, batch_norm, check_activation, group_arguments, group_obstacle, pair


@takes_tensor
def conv_transpose2d_bn_act(
    input, weight, bias=None, bn_weight=None, bn_bias=None, running_mean=None, running_var=None, *,
    stride=1, padding=0, output_padding=0, groups=1, dilation=1, training=True, momentum=0.1, eps=1e-5,
    activation="relu", negative_slope=0.2, process_group=None,
):  # fmt: skip
    """``activation(batch_norm(conv_transpose2d(input)))`` as one operator.

    Args:
        input: ``[N, C_in, H, W]`` or ``[C_in, H, W]``; float32, bfloat16, float16 or float64; any strides.
        weight: ``[C_in, C_out / groups, kH, kW]``, dtype of input.
        bias: ``[C_out]``, dtype of input.
        bn_weight, bn_bias: ``[C_out]``, scale and shift of batch norm; dtype of input, or float32 beside a lower
            precision input. None: 1 and 0.
        running_mean, running_var: ``[C_out]``, same dtypes. Updated in place when training (the variance unbiased);
            used for normalisation when not.
        stride, dilation: int or pair, at least 1.
        padding: int or pair, at least 0.
        output_padding: int or pair, at least 0 and smaller than stride or dilation.
        groups: divides C_in and C_out.
        training, momentum, eps, activation, negative_slope, process_group: as in :func:`fastgan.ops.conv2d_bn_act`.

    Returns:
        ``[N, C_out, H_out, W_out]`` (no N for unbatched input) with the dtype of input and the memory format that
        ``F.conv_transpose2d`` gives; ``H_out = (H - 1) * stride - 2 * padding + dilation * (kH - 1) +
        output_padding + 1``.

    Derivatives of every order: the first by a fused kernel, higher ones through differentiable PyTorch operators.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`fastgan.ops.conv2d_bn_act`.

    Batch normalisation: Ioffe and Szegedy 2015, algorithm 1. As generator layer: Radford et al. 2015, section 3.
    """
    op = "conv_transpose2d_bn_act"
    group = process_group if training else None
    run, group = (
        (torch.ops.fastgan.conv_transpose2d_bn_act, group_arguments(group))
        if _extension.runs_fused(op, input, group_obstacle(group, input.device))
        else (conv_transpose2d_bn_act_reference, {"process_group": group})
    )
    return run(
        input, weight, bias, bn_weight, bn_bias, running_mean, running_var,
        stride=pair(stride), padding=pair(padding), output_padding=pair(output_padding), groups=groups, dilation=pair(dilation),
        training=training, momentum=momentum, eps=eps, activation=activation, negative_slope=negative_slope, **group,
    )  # fmt: skip


def conv_transpose2d_bn_act_reference(
    input, weight, bias=None, bn_weight=None, bn_bias=None, running_mean=None, running_var=None, *,
    stride=1, padding=0, output_padding=0, groups=1, dilation=1, training=True, momentum=0.1, eps=1e-5,
    activation="relu", negative_slope=0.2, process_group=None,
):  # fmt: skip
    """conv_transpose2d_bn_act in plain PyTorch: the fallback where there are no kernels, and the tests' oracle."""
    check_activation("conv_transpose2d_bn_act", activation, negative_slope)
    y = F.conv_transpose2d(as_batch(input), weight, bias, stride, padding, output_padding, groups, dilation)
    z = batch_norm(y, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps, process_group)
    output = activate("conv_transpose2d_bn_act", z, activation, negative_slope)
    return output[0] if input.dim() == 3 else output


@takes_tensor
def conv_transpose2d_act(
    input, weight, bias=None, *, stride=1, padding=0, output_padding=0, groups=1, dilation=1,
    activation="relu", negative_slope=0.2,
):  # fmt: skip
    """``activation(conv_transpose2d(input))`` as one operator: the generator's last layer.

    Args:
        input: ``[N, C_in, H, W]`` or ``[C_in, H, W]``; float32, bfloat16, float16 or float64; any strides.
        weight: ``[C_in, C_out / groups, kH, kW]``, dtype of input.
        bias: ``[C_out]``, dtype of input.
        stride, dilation: int or pair, at least 1.
        padding: int or pair, at least 0.
        output_padding: int or pair, at least 0 and smaller than stride or dilation.
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
    op = "conv_transpose2d_act"
    run = torch.ops.fastgan.conv_transpose2d_act if _extension.runs_fused(op, input) else conv_transpose2d_act_reference
    return run(
        input, weight, bias, stride=pair(stride), padding=pair(padding), output_padding=pair(output_padding), groups=groups,
        dilation=pair(dilation), activation=activation, negative_slope=negative_slope,
    )  # fmt: skip


def conv_transpose2d_act_reference(
    input, weight, bias=None, *, stride=1, padding=0, output_padding=0, groups=1, dilation=1,
    activation="relu", negative_slope=0.2,
):  # fmt: skip
    """conv_transpose2d_act in plain PyTorch: the fallback where there are no kernels, and the tests' oracle."""
    y = F.conv_transpose2d(input, weight, bias, stride, padding, output_padding, groups, dilation)
    return activate("conv_transpose2d_act", y, activation, negative_slope)
