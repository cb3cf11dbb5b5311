"""Finding and running the layers of a network that fuse() changed, in the order of its calls."""

from typing import NamedTuple

import torch
from torch import nn
from torch._prims_common import suggest_memory_format
from torch.nn.modules import module as nn_module

from fastgan import _extension, ops
from fastgan.nn._switch import Switch
from fastgan.nn.modules import BatchNormCall, GaussianNoise, conv_arguments, counted, run_batch_norm_layer
from fastgan.nn.sync_batch_norm import SyncBatchNorm
from fastgan.ops._conv import activate, pair
from fastgan.ops.conv_stack import StackCall, fits_minimal_filtering, fits_to_pixel, in_format
from fastgan.ops.linear_stack import LinearStackCall, linear_stack_gains

ACTIVATIONS = {nn.ReLU: "relu", nn.LeakyReLU: "leaky_relu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid"}
BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, SyncBatchNorm)
CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# The autocast dtypes in which a run of layers is one operator.
_STACK_AUTOCAST = {"cpu": (torch.bfloat16,), "cuda": (torch.bfloat16, torch.float16)}
# Numbers from which a BatchNorm1d is faster by its operator; drawn noise pays always.
_FEWEST_NUMBERS = 2**15
_leaves_channels_last = Switch()  # see images_in_channels_last()


def run_children(children, input):
    """Calls `children` one after the other, those that can be fused as one."""
    if _layer_by_layer():
        for child in children:
            input = child(input)
        return input
    position = 0
    while position < len(children):
        layers = []
        if _fusable_input(input):
            while (layer := match_layer(children, position)) is not None:
                layers.append(layer)
                position += layer.length
        if layers:
            input = _run(layers, input)
        elif (perceptron := _run_perceptron(children, position, input)) is not None:
            input, position = perceptron
        elif (norm := _match_norm(children, position, input)) is not None:
            input = norm.run(input)
            position += norm.length
        else:
            input = children[position](input)
            position += 1
    return input


def _layer_by_layer():
    """Whether PyTorch's own operators are wanted: what torch.jit and ONNX write is to run without fastgan, and
    torch.func's transforms have no rules for the fused ones."""
    return torch.jit.is_tracing() or torch.onnx.is_in_onnx_export() or _extension.transformed()


class Activation(NamedTuple):
    """An activation that forward calls as a function."""

    name: str
    negative_slope: float = 0.2

    def __call__(self, input):
        return activate("fuse", input, self.name, self.negative_slope)


class _Layer:
    """One convolution with what is fused to it: children[position : position + length]."""

    def __init__(self, conv, bn, activation):
        self.conv, self.bn = conv, bn
        self.length = 1 + (bn is not None) + (activation is not None)
        # One channel is in both memory formats; its strides are then those of the default one, but where a convolution has made them.
        self.resets_format = conv.out_channels == 1 and self.length > 1 and (bn is not None or not getattr(activation, "inplace", False))
        if activation is None:
            self.activation = "identity"
        else:
            self.activation = activation.name if type(activation) is Activation else ACTIVATIONS[type(activation)]
        self.negative_slope = activation.negative_slope if self.activation == "leaky_relu" else 0.2

    def describe_activation(self):
        if self.activation == "identity":
            return None
        return f"leaky_relu({self.negative_slope:g})" if self.activation == "leaky_relu" else self.activation

    def run(self, input):
        transposed = isinstance(self.conv, nn.ConvTranspose2d)  # whose class another thread may have changed: see _trace.py
        if input.is_cpu and self.has_loop(input):
            # Others stay in the format that comes: ATen's convolutions seldom gain more by channels_last than the way there and back takes.
            input = in_format(input, torch.channels_last)
        arguments = dict(conv_arguments(self.conv), activation=self.activation, negative_slope=self.negative_slope)
        if self.bn is None:
            operator = ops.conv_transpose2d_act if transposed else ops.conv2d_act
            return operator(input, self.conv.weight, self.conv.bias, **arguments)
        operator = ops.conv_transpose2d_bn_act if transposed else ops.conv2d_bn_act
        return run_batch_norm_layer(operator, input, self.conv, self.bn, arguments)

    def is_filtered(self):
        """Whether its convolution is one for minimal filtering."""
        conv = self.conv
        if not fits_minimal_filtering(conv.weight.shape, pair(conv.stride), pair(conv.padding)):
            return False
        return conv.groups == 1 and pair(conv.dilation) == (1, 1) and not any(pair(conv.output_padding))

    def has_loop(self, input):
        """Whether a loop of fastgan's own computes its convolution of `input` on the CPU, if that is in channels_last:
        conv_stack_single() in csrc/ops/conv_stack.cpp."""
        conv = self.conv
        shape = conv.weight.shape
        to_pixel = not conv.transposed and fits_to_pixel(shape) and shape[2:] == input.shape[2:] and conv.groups == 1
        to_pixel = to_pixel and not any(pair(conv.padding)) and pair(conv.dilation) == (1, 1)
        if not (to_pixel or self.is_filtered()):
            return False
        dtype = _autocast_dtype("cpu") or input.dtype
        return input.dtype != torch.float64 and dtype in (torch.float32, torch.bfloat16)


class _Norm:
    """A BatchNorm1d, or None, with the activation and the noise after it: children[position : position + length]."""

    def __init__(self, children, position):
        found, end = [], position
        for types in ((nn.BatchNorm1d,), ACTIVATIONS, (GaussianNoise,)):
            child = children[end] if end < len(children) else None
            taken = type(child) in types and is_plain(child)
            found.append(child if taken else None)
            end += taken
        self.bn, activation, self.noise = found
        self.length = end - position
        self.activation = "identity" if activation is None else ACTIVATIONS[type(activation)]
        self.negative_slope = activation.negative_slope if self.activation == "leaky_relu" else 0.2

    @property
    def noise_std(self):
        return _noise_std(self.noise)

    def run(self, input):
        call = BatchNormCall(self.bn)
        running_mean, running_var = call.running or (None, None)
        with counted(call):
            return ops.batch_norm_act_noise(
                input, self.bn.weight, self.bn.bias, running_mean, running_var, training=call.uses_batch,
                momentum=call.momentum, eps=self.bn.eps, activation=self.activation, negative_slope=self.negative_slope,
                noise_std=self.noise_std,
            )  # fmt: skip


def _noise_std(noise):
    return noise.std if noise is not None and noise.training else 0.0


def _run_perceptron(children, position, input):
    """Calls the run of a perceptron's layers that starts at children[position] as one operator. Returns its output and the position after
    it, or None where there is no such run, or the operator does not take it."""
    stack, end = _match_perceptron(children, position, input)
    return None if stack is None else (stack.run(), end)


def _match_perceptron(children, position, input):
    """The run [GaussianNoise] (Linear [BatchNorm1d] [activation] [GaussianNoise])... that starts at children[position] as a
    LinearStackCall, and the position after it; (None, position) where there is none, or it gains nothing."""
    nothing, first = (None, position), children[position]
    noise = first if type(first) is GaussianNoise and is_plain(first) else None
    position += noise is not None
    if not (position < len(children) and type(children[position]) is nn.Linear and _fusable_rows(input)):
        return nothing
    if input.dim() != 2 or input.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return nothing
    if isinstance(input.shape[0], torch.SymInt) and torch.compiler.is_exporting():
        return nothing  # what gains goes by the rows, which an exported program is to leave open
    left = children[position:]
    kinds = [type(child) for child in left]
    # With a bias and batch norm's two numbers a feature, what all that is left would have as one run.
    most = sum([(child.in_features + 3) * child.out_features for child, kind in zip(left, kinds) if kind is nn.Linear])
    if not linear_stack_gains(input.shape[0], most, nn.BatchNorm1d in kinds):
        return nothing
    stack, calls = LinearStackCall(input, _noise_std(noise)), []
    while position < len(children) and type(linear := children[position]) is nn.Linear and is_plain(linear):
        norm = _Norm(children, position + 1)
        uses_batch, running, counter, momentum = False, (), None, 0.0
        if norm.bn is not None:
            call = BatchNormCall(norm.bn)
            uses_batch, running, counter, momentum = call.uses_batch, call.running, call.counter, call.momentum
            if any(call.running and other.running and call.running[0] is other.running[0] for other in calls):
                break  # a shared batch norm: what it is updated to comes first
        if not stack.add(
            linear, norm.bn, uses_batch, running, counter, momentum, norm.activation, norm.negative_slope, norm.noise_std
        ):
            break
        if norm.bn is not None:
            calls.append(call)
        position += 1 + norm.length
    return (stack, position) if stack.gains else nothing


def images_in_channels_last():
    """Inside, what leaves a fused run of layers is in channels_last, as it is between them, for a network that takes it so."""
    return _leaves_channels_last.on()


def _run(layers, input):
    """A run of fused layers. What leaves has the memory format that the plain layers would have given it, and so has the gradient of
    what comes in."""
    keeps_channels_last = _is_channels_last(input)
    for layer in layers:
        keeps_channels_last = keeps_channels_last or _is_channels_last(layer.conv.weight)
        keeps_channels_last = keeps_channels_last and not layer.resets_format
    output = _run_stack(layers, input)
    if output is None:
        output = input
        for layer in layers:
            output = layer.run(output)
        if not input.is_cpu:
            return output
    if keeps_channels_last or _leaves_channels_last.is_on:
        return output
    if not output.is_contiguous():
        output = in_format(output, torch.contiguous_format)
    if output.shape[1] == 1 and output.stride(1) == 1:
        # The bytes are the same in both formats, and only the strides tell the next layer which one it is.
        output = output.flatten().view(output.shape)
    return output


def _run_stack(layers, input):
    """The whole run as one operator, or None where it does not take these layers or gains nothing."""
    device, dtype = input.device.type, input.dtype
    if (autocast := _autocast_dtype(device)) is not None and dtype != torch.float64:
        # Images in the autocast dtype, parameters as they are: the loops round weights where they read them.
        dtype = autocast
        if dtype not in _STACK_AUTOCAST[device]:
            return None
    elif dtype != torch.float32 or device == "cuda":  # there cuDNN's loops are faster in float32
        return None
    if device == "cpu" and not any([layer.is_filtered() for layer in layers]):
        return None  # nothing would gain
    stack = StackCall(input, dtype)
    calls = []
    for layer in layers:
        uses_batch, running, momentum, group = False, (), 0.0, None
        if layer.bn is not None:
            call = BatchNormCall(layer.bn)
            uses_batch, running, momentum, group = call.uses_batch, call.running, call.momentum, call.process_group
            if any(call.running and other.running and call.running[0] is other.running[0] for other in calls):
                return None  # a shared batch norm, updated more than once
            calls.append(call)
        if not stack.add(
            layer.conv, layer.bn, uses_batch, running, momentum, layer.activation, layer.negative_slope, group
        ):
            return None
    if not stack.gains:
        return None
    with counted(*calls):
        return stack.run()


def _autocast_dtype(device):
    """None where autocast is off."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _is_channels_last(tensor):
    """By PyTorch's rule for tensors that are in both formats, because of sizes of 1: it goes by their strides."""
    if not tensor.is_contiguous(memory_format=torch.channels_last):
        return False
    return not tensor.is_contiguous() or suggest_memory_format(tensor) == torch.channels_last


def _fusable_input(input):
    return (
        isinstance(input, torch.Tensor)
        and input.dim() == 4
        and input.dtype in _DTYPES
        and input.layout == torch.strided
        and _extension.runs_on(input.device)
    )


def match_layer(children, position):
    """The fusable layer that starts at children[position], or None."""
    if position >= len(children):
        return None
    conv = children[position]
    if type(conv) not in CONVOLUTIONS or conv.padding_mode != "zeros" or not is_plain(conv):
        return None
    bn = activation = None
    position += 1
    if position < len(children) and type(children[position]) in BATCH_NORMS and is_plain(children[position]):
        bn = children[position]
        position += 1
    if position < len(children):
        child = children[position]
        if type(child) is Activation or type(child) in ACTIVATIONS and is_plain(child):
            activation = child
    if bn is None and type(activation) is nn.LeakyReLU and _changed_in_place(children, position):
        activation = None
    return _Layer(conv, bn, activation)


def _changed_in_place(children, position):
    """Whether the output of children[position] is overwritten by the child behind it. PyTorch takes the derivative of LeakyReLU from
    its input; the operators, behind a convolution alone, from the output, which then has to stay. Other activations need theirs anyway."""
    return position + 1 < len(children) and getattr(children[position + 1], "inplace", False) is True


def _match_norm(children, position, input):
    """The run of batch norm, activation and noise that starts at children[position], or None."""
    if type(children[position]) is not nn.BatchNorm1d or not is_plain(children[position]) or not _fusable_rows(input):
        return None
    norm = _Norm(children, position)
    # An exported program is to leave the rows open.
    gains = norm.noise_std or torch.compiler.is_exporting() or input.numel() >= _FEWEST_NUMBERS
    return norm if gains else None


def _fusable_rows(input):
    return (
        isinstance(input, torch.Tensor)
        and input.is_cpu
        and input.dim() in (2, 3)
        and input.dtype in _DTYPES
        and input.layout == torch.strided
        and _extension.has_kernels("cpu")
    )


def is_plain(child):
    """Whether calling `child` does nothing but its own class's forward."""
    state = child.__dict__
    if any(map(state.get, HOOKS)) or "forward" in state:
        return False
    return not (
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    )
