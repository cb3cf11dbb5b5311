"""Modules over the fused operators, and a layer of noise that they take in."""

import torch
from torch import nn
from torch.utils import checkpoint

from fastgan import ops
from fastgan._arguments import check_not_negative
from fastgan.nn.sync_batch_norm import synchronizing_group

# Raised by non-reentrant checkpointing where the last tensor has been saved; a private name of PyTorch's.
_ENOUGH = getattr(checkpoint, "_StopRecomputationError", ())


class GaussianNoise(nn.Module):
    """Adds Gaussian noise to a tensor of any shape in training mode; does nothing in eval mode.

    Args:
        std: standard deviation of the noise, 0 for none.

    Raises:
        ValueError, TypeError: std is below 0, or no number.
    """

    def __init__(self, std: float):
        check_not_negative("GaussianNoise", std=std)
        super().__init__()
        self.std = std

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training or self.std == 0:
            return input
        return input + self.std * torch.randn_like(input)

    def extra_repr(self) -> str:
        return f"std={self.std}"


class BatchNormCall:
    """The rules of nn.BatchNorm2d, or of nn.SyncBatchNorm, for one call of `bn`.

    Attributes:
        uses_batch: normalise by the statistics of the batch, not by the running ones.
        running: (running_mean, running_var) to use or update, or ().
        counter: num_batches_tracked where the batch is to be counted, or None.
        momentum: their weight for this batch.
        process_group: over whose processes the statistics of the batch are taken, or None.
    """

    def __init__(self, bn):
        self.process_group = synchronizing_group(bn)
        training, mean, var = bn.training, bn.running_mean, bn.running_var
        self.uses_batch = training or (mean is None and var is None)
        tracks = (not training or bn.track_running_stats) and mean is not None
        self.running = (mean, var) if tracks else ()
        self.counter = bn.num_batches_tracked if training and bn.track_running_stats else None
        if bn.momentum is not None:
            self.momentum = bn.momentum
        else:  # cumulative average
            self.momentum = 1.0 / float(self.counter + 1) if self.counter is not None else 0.0


class counted:
    """Inside, an operator runs for these calls of batch norms. Then the batch is counted, but not where an error came first: nothing is
    changed by one. When _ENOUGH is raised the running statistics have moved."""

    def __init__(self, *calls):
        self.calls = calls

    def __enter__(self):
        pass

    def __exit__(self, kind, error, traceback):
        if kind is not None and not issubclass(kind, _ENOUGH):
            return
        counters = [call.counter for call in self.calls if call.counter is not None]
        if len(counters) == 1:
            counters[0].add_(1)
        elif counters:  # on CUDA by one kernel
            torch._foreach_add_(counters, 1)


def run_batch_norm_layer(operator, input, conv, bn, arguments):
    """Calls a *_bn_act operator with the tensors of `conv` and the state of `bn`. Nothing is changed if it raises."""
    call = BatchNormCall(bn)
    running_mean, running_var = call.running or (None, None)
    with counted(call):
        return operator(
            input, conv.weight, conv.bias, bn.weight, bn.bias, running_mean, running_var,
            training=call.uses_batch, momentum=call.momentum, eps=bn.eps, process_group=call.process_group, **arguments,
        )  # fmt: skip


class _ConvBNAct2d(nn.Module):
    """Convolution `conv`, batch norm `bn` and an activation, run as one operator."""

    def extra_repr(self):
        slope = f", negative_slope={self.negative_slope}" if self.activation == "leaky_relu" else ""
        return f"activation={self.activation!r}{slope}"

    def plain(self):
        """The same as an nn.Sequential of torch's own layers, which shares its parameters with this module."""
        activation = {
            "relu": nn.ReLU, "leaky_relu": lambda: nn.LeakyReLU(self.negative_slope), "tanh": nn.Tanh,
            "sigmoid": nn.Sigmoid, "identity": nn.Identity,
        }[self.activation]()  # fmt: skip
        return nn.Sequential(self.conv, self.bn, activation).train(self.training)

    def _build(self, conv, eps, momentum, affine, track_running_stats, device, dtype, activation, negative_slope):
        if activation not in ops.ACTIVATIONS:
            raise ValueError(
                f"{type(self).__name__}: activation must be one of {', '.join(map(repr, ops.ACTIVATIONS))}, "
                f"got {activation!r}"
            )
        if conv.padding_mode != "zeros":
            raise ValueError(f"{type(self).__name__}: padding_mode must be 'zeros', got {conv.padding_mode!r}")
        self.conv = conv
        self.bn = nn.BatchNorm2d(conv.out_channels, eps, momentum, affine, track_running_stats, device, dtype)
        self.activation = activation
        self.negative_slope = negative_slope


class ConvBNAct2d(_ConvBNAct2d):
    """``activation(BatchNorm2d(Conv2d(input)))`` as one operator, :func:`fastgan.ops.conv2d_bn_act`.

    The children are ``conv`` (:class:`torch.nn.Conv2d`) and ``bn`` (:class:`torch.nn.BatchNorm2d`), plain PyTorch layers
    that hold the parameters; the arguments are theirs.

    Args:
        in_channels, out_channels: of input and output.
        kernel_size, stride, dilation: int or pair, at least 1.
        padding: int or pair, at least 0, or "same" or "valid".
        groups: divides both channel counts.
        bias: of the convolution; batch norm cancels it.
        padding_mode: must be "zeros".
        device, dtype: of the parameters.
        eps, momentum, affine, track_running_stats: of :class:`torch.nn.BatchNorm2d`.
        activation: "relu", "leaky_relu", "tanh", "sigmoid" or "identity".
        negative_slope: of leaky_relu.

    Shapes: input ``[N, in_channels, H, W]``, output ``[N, out_channels, H_out, W_out]``.

    Raises:
        ValueError: an unknown activation, another padding mode, or what the layers themselves refuse.
    """

    def __init__(
        self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=False,
        padding_mode="zeros", device=None, dtype=None, *, eps=1e-5, momentum=0.1, affine=True,
        track_running_stats=True, activation="leaky_relu", negative_slope=0.2,
    ):  # fmt: skip
        super().__init__()
        conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self._build(conv, eps, momentum, affine, track_running_stats, device, dtype, activation, negative_slope)

    def forward(self, input):
        return run_batch_norm_layer(
            ops.conv2d_bn_act, input, self.conv, self.bn,
            dict(conv_arguments(self.conv), activation=self.activation, negative_slope=self.negative_slope),
        )  # fmt: skip


class ConvTransposeBNAct2d(_ConvBNAct2d):
    """``activation(BatchNorm2d(ConvTranspose2d(input)))`` as one operator,
    :func:`fastgan.ops.conv_transpose2d_bn_act`.

    The children are ``conv`` (:class:`torch.nn.ConvTranspose2d`) and ``bn`` (:class:`torch.nn.BatchNorm2d`), plain PyTorch
    layers that hold the parameters; the arguments are theirs.

    Args:
        in_channels, out_channels: of input and output.
        kernel_size, stride, dilation: int or pair, at least 1.
        padding: int or pair, at least 0.
        output_padding: int or pair, at least 0 and smaller than stride or dilation.
        groups: divides both channel counts.
        bias: of the convolution; batch norm cancels it.
        padding_mode: must be "zeros".
        device, dtype: of the parameters.
        eps, momentum, affine, track_running_stats: of :class:`torch.nn.BatchNorm2d`.
        activation: "relu", "leaky_relu", "tanh", "sigmoid" or "identity".
        negative_slope: of leaky_relu.

    Shapes: input ``[N, in_channels, H, W]``, output ``[N, out_channels, H_out, W_out]``.

    Raises:
        ValueError: an unknown activation, another padding mode, or what the layers themselves refuse.
    """

    def __init__(
        self, in_channels, out_channels, kernel_size, stride=1, padding=0, output_padding=0, groups=1, bias=False,
        dilation=1, padding_mode="zeros", device=None, dtype=None, *, eps=1e-5, momentum=0.1, affine=True,
        track_running_stats=True, activation="relu", negative_slope=0.2,
    ):  # fmt: skip
        super().__init__()
        conv = nn.ConvTranspose2d(
            in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation,
            padding_mode, device, dtype,
        )  # fmt: skip
        self._build(conv, eps, momentum, affine, track_running_stats, device, dtype, activation, negative_slope)

    def forward(self, input):
        return run_batch_norm_layer(
            ops.conv_transpose2d_bn_act, input, self.conv, self.bn,
            dict(conv_arguments(self.conv), activation=self.activation, negative_slope=self.negative_slope),
        )  # fmt: skip


def conv_arguments(conv):
    """The keyword arguments of the operator that does what `conv` (nn.Conv2d or nn.ConvTranspose2d) does."""
    arguments = dict(stride=conv.stride, padding=conv.padding, dilation=conv.dilation, groups=conv.groups)
    if isinstance(conv, nn.ConvTranspose2d):
        arguments["output_padding"] = conv.output_padding
    return arguments
