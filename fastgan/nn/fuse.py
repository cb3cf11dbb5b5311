"""fuse(): makes the runs of layers inside somebody's nn.Sequential run on the fused operators."""

import copy
import functools

import torch
from torch import nn
from torch.nn.modules import module as nn_module

from fastgan import _extension, ops
from fastgan.nn.modules import BatchNormCall, GaussianNoise, conv_arguments, run_batch_norm_layer
from fastgan.nn.sync_batch_norm import SyncBatchNorm
from fastgan.ops.conv_stack import StackCall

_ACTIVATIONS = {nn.ReLU: "relu", nn.LeakyReLU: "leaky_relu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid"}
_BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, SyncBatchNorm)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def fuse(module, inplace=False):
    """Makes every run ``ConvTranspose2d | Conv2d [+ BatchNorm2d] [+ ReLU | LeakyReLU | Tanh | Sigmoid]`` inside any
    ``nn.Sequential`` of `module`, at any depth, run on the fused operators; on the CPU also every run
    ``BatchNorm1d [+ ReLU | LeakyReLU | Tanh | Sigmoid] [+ fastgan.nn.GaussianNoise]``, as a perceptron has it after its
    ``Linear``. (Noise has the values that :func:`fastgan.ops.batch_norm_act_noise` draws, not ``randn``'s.)
    ``SyncBatchNorm`` may stand for ``BatchNorm2d``; on the CPU, where PyTorch's own does not run, it does so then.

    Only the way the Sequentials compute changes. All layers stay where they were, with their names, parameters,
    buffers, hooks and modes: state_dict keys, initialisation by ``apply``, ``train()``/``eval()``, optimizers built
    before or after, deep copies, pickles and ``torch.func.functional_call`` work as before, and outputs, gradients
    and running statistics agree with the plain module's to rounding. What cannot be fused runs as it did: layers with
    hooks, parametrizations (spectral or weight norm), subclasses of the layers named above, padding modes other than
    zeros. That is decided at each call, so hooks added later are honoured.

    Args:
        module: the ``nn.Module`` to fuse.
        inplace: change `module` itself and return it. Otherwise a new module is returned and `module` is left as it
            is; the two **share parameters and buffers**, so an optimizer built on `module` trains both. For an
            independent network pass ``copy.deepcopy(module)``.

    Returns:
        The fused module. Fusing it again changes nothing.

    Raises:
        TypeError: `module` is not an ``nn.Module``.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"fuse: module must be a torch.nn.Module, got {type(module).__name__}")
    if not inplace:
        tensors = [*module.parameters(), *module.buffers()]
        module = copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})
    for child in module.modules():
        if isinstance(child, nn.Sequential) and type(child).forward is nn.Sequential.forward:
            child.__class__ = _fused_class(type(child))
    return module


class FusedSequential:
    """What fuse() mixes into the class of an nn.Sequential."""

    def forward(self, input):
        children = list(self)
        position = 0
        while position < len(children):
            layers = []
            if _fusable_input(input):
                while (layer := _match(children, position)) is not None:
                    layers.append(layer)
                    position += layer.length
            if layers:
                input = _run(layers, input)
            elif (norm := _match_norm(children, position, input)) is not None:
                input = norm.run(input)
                position += norm.length
            else:
                input = children[position](input)
                position += 1
        return input

    def __reduce__(self):
        return _rebuild, (type(self).__bases__[1],), self.__dict__


@functools.cache
def _fused_class(base):
    return type(f"Fused{base.__name__}", (FusedSequential, base), {"__module__": base.__module__})


def _rebuild(base):
    cls = _fused_class(base)
    return cls.__new__(cls)


class _Layer:
    """One convolution with what is fused to it: children[position : position + length]."""

    def __init__(self, conv, bn, activation):
        self.conv, self.bn = conv, bn
        self.length = 1 + (bn is not None) + (activation is not None)
        self.activation = "identity" if activation is None else _ACTIVATIONS[type(activation)]
        self.negative_slope = activation.negative_slope if self.activation == "leaky_relu" else 0.2

    def run(self, input):
        transposed = type(self.conv) is nn.ConvTranspose2d
        arguments = dict(conv_arguments(self.conv), activation=self.activation, negative_slope=self.negative_slope)
        if self.bn is None:
            operator = ops.conv_transpose2d_act if transposed else ops.conv2d_act
            return operator(input, self.conv.weight, self.conv.bias, **arguments)
        operator = ops.conv_transpose2d_bn_act if transposed else ops.conv2d_bn_act
        return run_batch_norm_layer(operator, input, self.conv, self.bn, arguments)


class _Norm:
    """A BatchNorm1d with the activation and the noise after it."""

    def __init__(self, bn, activation, noise):
        self.bn, self.noise = bn, noise
        self.length = 1 + (activation is not None) + (noise is not None)
        self.activation = "identity" if activation is None else _ACTIVATIONS[type(activation)]
        self.negative_slope = activation.negative_slope if self.activation == "leaky_relu" else 0.2

    def run(self, input):
        call = BatchNormCall(self.bn)
        running_mean, running_var = call.running or (None, None)
        output = ops.batch_norm_act_noise(
            input, self.bn.weight, self.bn.bias, running_mean, running_var, training=call.uses_batch,
            momentum=call.momentum, eps=self.bn.eps, activation=self.activation, negative_slope=self.negative_slope,
            noise_std=self.noise.std if self.noise is not None and self.noise.training else 0.0,
        )  # fmt: skip
        call.done()
        return output


def _run(layers, input):
    """A run of fused layers. What leaves has the memory format that the plain layers would have given it."""
    if input.device.type != "cpu":
        for layer in layers:
            input = layer.run(input)
        return input
    keeps_channels_last = _is_channels_last(input) or any(_is_channels_last(layer.conv.weight) for layer in layers)
    output = _run_stack(layers, input)
    if output is None:
        # Between themselves the layers work in channels_last, where ATen's convolutions are faster.
        output = input.contiguous(memory_format=torch.channels_last)
        for layer in layers:
            output = layer.run(output)
    return output if keeps_channels_last else output.contiguous()


def _run_stack(layers, input):
    """The whole run as one operator, or None where it does not take these layers or gains nothing."""
    if torch.is_autocast_enabled("cpu") and input.dtype != torch.float64:
        # Images in the autocast dtype, parameters as they are: the loops round weights where they read them.
        if torch.get_autocast_dtype("cpu") != torch.bfloat16:
            return None
        input = input.to(torch.bfloat16)
    elif input.dtype != torch.float32:
        return None
    stack = StackCall(input)
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
    output = stack.run()
    for call in calls:
        call.done()
    return output


def _is_channels_last(tensor):
    """In channels_last and in no other format: sizes of 1 make both true."""
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def _fusable_input(input):
    return (
        isinstance(input, torch.Tensor)
        and input.dim() == 4
        and input.dtype in _DTYPES
        and input.layout == torch.strided
        and _extension.has_kernels(input.device.type)
    )


def _match(children, position):
    """The fusable layer that starts at children[position], or None."""
    if position >= len(children):
        return None
    conv = children[position]
    if type(conv) not in (nn.Conv2d, nn.ConvTranspose2d) or conv.padding_mode != "zeros" or not _plain(conv):
        return None
    bn = activation = None
    position += 1
    if position < len(children) and type(children[position]) in _BATCH_NORMS and _plain(children[position]):
        bn = children[position]
        position += 1
    if position < len(children) and type(children[position]) in _ACTIVATIONS and _plain(children[position]):
        activation = children[position]
    return _Layer(conv, bn, activation)


def _match_norm(children, position, input):
    """The run of batch norm, activation and noise that starts at children[position], or None."""
    bn = children[position]
    if type(bn) is not nn.BatchNorm1d or not _plain(bn) or not _fusable_rows(input):
        return None

    def next_if(position, types):
        child = children[position] if position < len(children) else None
        return child if type(child) in types and _plain(child) else None

    activation = next_if(position + 1, _ACTIVATIONS)
    return _Norm(bn, activation, next_if(position + 1 + (activation is not None), (GaussianNoise,)))


def _fusable_rows(input):
    return (
        isinstance(input, torch.Tensor)
        and input.is_cpu
        and input.dim() in (2, 3)
        and input.dtype in _DTYPES
        and input.layout == torch.strided
        and _extension.has_kernels("cpu")
    )


def _plain(child):
    """Whether calling `child` does nothing but its own class's forward."""
    if any(getattr(child, hooks, None) for hooks in _HOOKS) or "forward" in child.__dict__:
        return False
    return not (
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    )
