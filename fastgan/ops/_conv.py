"""What the operators of the convolution family share: arguments, references, fake kernels."""

import numbers

import torch
import torch.nn.functional as F

from fastgan import _extension
from fastgan.ops._dtypes import sums_dtype
from fastgan.ops._sync_batch_norm import sync_batch_norm

ACTIVATIONS = ("relu", "leaky_relu", "tanh", "sigmoid", "identity")
# The enum Activation in csrc/activation.h.
ACTIVATION_CODES = {name: code for code, name in enumerate(("identity", "relu", "leaky_relu", "tanh", "sigmoid"))}
assert set(ACTIVATION_CODES) == set(ACTIVATIONS)


def check_activation(op, activation, negative_slope):
    """Refuses a name that is none of an activation and a slope that is no number: in time, before anything is changed."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}")
    if not isinstance(negative_slope, (numbers.Real, torch.SymFloat, torch.Tensor)):
        raise TypeError(f"{op}: negative_slope must be a number, got {type(negative_slope).__name__}")


def activate(op, z, activation, negative_slope):
    """The activation by name, in plain PyTorch."""
    check_activation(op, activation, negative_slope)
    if activation == "relu":
        return F.relu(z)
    if activation == "leaky_relu":
        return F.leaky_relu(z, negative_slope)
    if activation == "tanh":
        return torch.tanh(z)
    if activation == "sigmoid":
        return torch.sigmoid(z)
    return z


def fits_cuda_loop(stride, padding, small):
    """Whether csrc/cuda has a main loop for a 4 x 4 kernel without groups and dilation, from its stride and padding (pairs) and the sides
    of the smaller image."""
    return (stride, padding) == ((2, 2), (1, 1)) or (stride, padding) == ((1, 1), (0, 0)) and tuple(small) == (1, 1)


def as_batch(input):
    """[C, H, W] as a batch of one, ahead of the convolution. F.batch_norm's backward in PyTorch is wrong where its input or its
    gradient is a [C, H, W] in channels_last to which unsqueeze(0) has given a batch's dimension, so that the way back is by
    output[0] and not by squeeze(0), whose backward is unsqueeze(0)."""
    return input.unsqueeze(0) if input.dim() == 3 else input


def batch_norm(y, running_mean, running_var, weight, bias, training, momentum, eps, process_group=None):
    """F.batch_norm, when training over the processes of a group where one is given."""
    if training and process_group is not None:
        return sync_batch_norm(y, running_mean, running_var, weight, bias, momentum, eps, process_group)
    return F.batch_norm(y, running_mean, running_var, weight, bias, training, momentum, eps)


def explicit_padding(op, input, weight, stride, padding, dilation):
    """Turns padding="same" / "valid" of F.conv2d into numbers. Returns (input, padding); input is padded here where
    "same" is not symmetric."""
    if padding == "valid":
        return input, 0
    if padding != "same":
        raise ValueError(f"{op}: padding must be an integer, a pair of integers, 'same' or 'valid', got {padding!r}")
    if any(step != 1 for step in pair(stride)):
        raise ValueError(f"{op}: padding='same' needs stride 1, got {stride}")
    totals = [step * (size - 1) for step, size in zip(pair(dilation), weight.shape[2:])]
    if any(total % 2 for total in totals):
        # F.pad takes (left, right, top, bottom); the odd row or column goes to the end, as in F.conv2d.
        input = F.pad(input, [0, totals[1] % 2, 0, totals[0] % 2])
    return input, [total // 2 for total in totals]


def pair(value):
    """2 -> (2, 2), as torch.nn.functional reads an int where height and width each take one."""
    if type(value) is tuple and len(value) == 2 and type(value[0]) is type(value[1]) is int:  # nearly always
        return value
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    values = tuple(int(v) if isinstance(v, torch.SymInt) else v for v in values)  # torch.compile: specialise
    return values * 2 if len(values) == 1 else values


def group_arguments(process_group):
    """A group of torch.distributed as the compiled operators take it: by name and size."""
    if process_group is None or process_group.size() == 1:
        return {}
    return {"process_group": process_group.group_name, "processes": process_group.size()}


NO_GROUP_ON_CUDA = "the CUDA kernels take no process_group"


def group_obstacle(process_group, device):
    """What speaks against the kernels for a layer with a group on `device`; None for nothing."""
    return NO_GROUP_ON_CUDA if process_group is not None and device.type == "cuda" else None


if _extension.has_kernels("cpu"):

    def _fake_conv(input, weight, stride, padding, dilation, transposed, output_padding, groups):
        """Shape of the output by ATen's own rule; its format is channels_last if that of input or weight is."""
        y = torch.ops.aten.convolution(
            input, weight, None, stride, padding, dilation, transposed, output_padding, groups
        )
        return y.contiguous(memory_format=torch._prims_common.suggest_memory_format(y))

    def _like_by_strides(tensor):
        """In the format that ATen takes `tensor` to be in, also of one channel or pixel: it goes by the strides."""
        return torch.empty_like(tensor, memory_format=torch._prims_common.suggest_memory_format(tensor))

    def _cuda_main_loop(input, weight, y, stride, padding, dilation, transposed, groups):
        """Whether the raw output y comes from a main loop of csrc/cuda, in channels_last whatever the
        format of its operands: known_geometry() in csrc/ops/cuda_conv_bn_act.cpp."""
        if input.device.type != "cuda" or y.itemsize != 2 or y.numel() == 0 or input.numel() == 0:
            return False
        if tuple(weight.shape[2:]) != (4, 4) or groups != 1 or any(d != 1 for d in dilation):
            return False
        small = input if transposed else y
        return fits_cuda_loop(tuple(stride), tuple(padding), small.shape[2:])

    @torch.library.register_fake("fastgan::conv_bn_act_forward")
    def _(
        input, weight, bias, bn_weight, bn_bias, running_mean, running_var,
        stride, padding, dilation, transposed, output_padding, groups,
        training, momentum, eps, activation, negative_slope, save_for_backward, process_group="", processes=1,
    ):  # fmt: skip
        y = _fake_conv(input, weight, stride, padding, dilation, transposed, output_padding, groups)
        mean = y.new_empty([y.shape[1]], dtype=sums_dtype(y))
        if not save_for_backward:
            saved = y.new_empty([0])
        elif _cuda_main_loop(input, weight, y, stride, padding, dilation, transposed, groups):
            saved = torch.empty_like(y, memory_format=torch.channels_last)
        else:
            saved = torch.empty_like(y)
        return y, saved, mean, torch.empty_like(mean)

    @torch.library.register_fake("fastgan::conv_bn_act_backward")
    def _(
        grad_output, input, weight, conv_output, mean, invstd, bn_weight, bn_bias,
        stride, padding, dilation, transposed, output_padding, groups,
        training, activation, negative_slope, output_mask, process_group="", processes=1,
    ):  # fmt: skip
        def like(tensor, wanted):
            return torch.empty_like(tensor) if wanted and tensor is not None else conv_output.new_empty([0])

        bias = conv_output.new_empty([conv_output.shape[1] if output_mask[2] else 0])
        return (
            *_fake_conv_gradients(conv_output, input, weight, output_mask),
            bias,
            like(bn_weight, output_mask[3]),
            like(bn_bias, output_mask[4]),
        )

    @torch.library.register_fake("fastgan::conv_act_forward")
    def _(
        input, weight, bias, stride, padding, dilation, transposed, output_padding, groups, activation, negative_slope
    ):
        return _fake_conv(input, weight, stride, padding, dilation, transposed, output_padding, groups)

    @torch.library.register_fake("fastgan::conv_act_backward")
    def _(
        grad_output, input, weight, output, stride, padding, dilation, transposed, output_padding, groups,
        activation, negative_slope, output_mask,
    ):  # fmt: skip
        bias = output.new_empty([output.shape[1] if output_mask[2] else 0])
        return (*_fake_conv_gradients(output, input, weight, output_mask), bias)

    def _fake_conv_gradients(y, input, weight, output_mask):
        none = y.new_empty([0])
        return (
            _like_by_strides(input) if output_mask[0] else none,
            _like_by_strides(weight) if output_mask[1] else none.clone(),
        )
