"""A run of convolution layers as one operator: how fuse() executes a Sequential from end to end.

Not public: :func:`fastgan.fuse` decides when it applies. csrc/ops/conv_stack.cpp and cuda_conv_stack.cpp say what it saves.
"""

import math

import torch

from fastgan import _extension
from fastgan.ops._conv import ACTIVATION_CODES, fits_cuda_loop, group_arguments, pair

_INTEGERS, _NUMBERS = 12, 3  # a layer, as in csrc/ops/conv_stack.h
_CUDA_PIXELS = 2**31 - 128  # indices_fit() in csrc/cuda/conv4x4s2.cu
_CUDA_SAVED_BYTES = 8 << 20  # kSavedBytes in csrc/ops/cuda_conv_stack_plan.h


def in_format(images, memory_format):
    """``images.contiguous(memory_format=memory_format)``, faster for many on the CPU, and with a contiguous gradient of contiguous
    images (csrc/ops/image_format.cpp)."""
    if _extension.has_kernels("cpu"):
        return torch.ops.fastgan.contiguous_images(images, memory_format == torch.channels_last)
    return images.contiguous(memory_format=memory_format)


def fits_minimal_filtering(weight_shape, stride, padding):
    """Whether a convolution without groups, dilation and output_padding is one for minimal filtering: what conv4x4s2_supported() in
    csrc/cpu/conv4x4s2.cpp asks of its weight ([channels of the smaller image, of the larger one, kH, kW]), stride and padding (pairs)."""
    if tuple(weight_shape[2:]) != (4, 4) or stride != (2, 2) or padding != (1, 1):
        return False
    small, large = weight_shape[:2]
    return small % 16 == 0 and (large <= 4 or large % 16 == 0)


def fits_to_pixel(weight_shape):
    """Whether a convolution of a whole image to one pixel has a loop of its own: to_pixel_supported() in csrc/cpu/to_pixel.cpp."""
    return weight_shape[0] <= 4 and weight_shape[1] % 16 == 0


class StackCall:
    """Collects the arguments of one call, layer by layer.

    Args:
        input: ``[N, C, H, W]``.
        dtype: of the images, to which input is cast: float32 or bfloat16, on CUDA bfloat16 or float16. Parameters are
            float32 either way.

    Attributes:
        shape: ``[N, C, H, W]`` of the output of the layers added so far.
        gains: whether one of them runs on fastgan's own loops, without which the call is not worth it; on CUDA no others
            are taken.
    """

    def __init__(self, input, dtype):
        self.input, self.dtype = input, dtype
        self.shape = tuple(input.shape)
        self.gains = False
        self.process_group = None
        self._cuda, self._complete = input.device.type == "cuda", False
        self.parameters, self.running, self.layers, self.numbers = [], [], [], []

    def add(self, conv, bn, uses_batch, running, momentum, activation, negative_slope, process_group=None):
        """Adds a layer. False, and nothing is added, if the operator does not take it.

        Args:
            conv: nn.Conv2d or nn.ConvTranspose2d.
            bn: nn.BatchNorm2d, nn.SyncBatchNorm or None.
            uses_batch: whether batch norm normalises by the statistics of the batch.
            running: (running_mean, running_var), or () where there are none to use or update.
            momentum: of the running statistics.
            process_group: over whose processes the statistics of the batch are taken; the same for all layers.
        """
        if process_group is not None and self.process_group not in (None, process_group):
            return False
        weight, transposed = conv.weight, isinstance(conv, torch.nn.ConvTranspose2d)
        parameters = [weight, conv.bias, *((bn.weight, bn.bias) if bn is not None else (None, None))]
        if isinstance(conv.padding, str) or conv.groups != 1 or any(d != 1 for d in pair(conv.dilation)):
            return False
        stride, padding = pair(conv.stride), pair(conv.padding)
        if transposed and any(pair(conv.output_padding)):
            return False
        if any(t is not None and (t.dtype != torch.float32 or t.device != self.input.device) for t in (*parameters, *running)):
            return False
        if any(not t.is_contiguous() for t in running):
            return False
        batch, channels, *size = self.shape
        c_in, c_out = (0, 1) if transposed else (1, 0)
        if weight.dim() != 4 or weight.shape[c_in] != channels or weight.numel() == 0:
            return False
        out_channels = weight.shape[c_out]
        if any(t is not None and tuple(t.shape) != (out_channels,) for t in (*parameters[1:], *running)):
            return False
        new_size = []
        for side, k, s, p in zip(size, weight.shape[2:], stride, padding):
            room = side + 2 * p - k
            new_size.append((side - 1) * s - 2 * p + k if transposed else room // s + 1 if room >= 0 else 0)
        if min(new_size) < 1 or batch < 1 or (
            uses_batch and process_group is None and batch * new_size[0] * new_size[1] == 1
        ):
            return False
        if self._cuda and not self._cuda_takes(conv, stride, padding, new_size, process_group):
            return False
        if self._cuda and bn is not None and not uses_batch and len(running) == 0:
            return False
        if self._cuda and bn is None and activation not in ("identity", "relu"):
            # Only the output is kept, from which the derivative is taken: by its sign where a layer follows.
            if activation == "leaky_relu" and negative_slope < 0:
                return False
            self._complete = activation != "leaky_relu"
        minimal = fits_minimal_filtering(weight.shape, stride, padding)
        if self.dtype == torch.bfloat16 and _extension.CPU_ISA == "amx":  # conv4x4s2_supported in csrc/cpu/conv4x4s2.cpp
            minimal &= batch >= 16
        self.gains |= self._cuda or minimal
        self.shape = (batch, out_channels, *new_size)
        self.parameters += [p for p in parameters if p is not None]
        self.running += running
        present = [p is not None for p in parameters[1:]]
        self.process_group = process_group or self.process_group
        statistics = uses_batch if process_group is None else 2
        flags = [present[0], bn is not None, present[1], present[2], len(running) > 0, statistics]
        self.layers += [int(transposed), *stride, *padding, *map(int, flags), ACTIVATION_CODES[activation]]
        self.numbers += [momentum, bn.eps if bn is not None else 0.0, negative_slope]
        return True

    def _cuda_takes(self, conv, stride, padding, new_size, process_group):
        """The rule of make_plan() in csrc/ops/cuda_conv_stack_plan.cpp."""
        if self._complete or process_group is not None or tuple(conv.weight.shape[2:]) != (4, 4):
            return False
        weight, small, large = conv.weight, new_size, self.shape[2:]
        if isinstance(conv, torch.nn.ConvTranspose2d):
            small, large = large, small
        if not weight.is_contiguous() and not weight.is_contiguous(memory_format=torch.channels_last):
            return False
        if self.shape[0] * (large[0] + 1) * (large[1] + 1) >= _CUDA_PIXELS:
            return False
        return fits_cuda_loop(stride, padding, small)

    def run(self):
        """``[N, C, H, W]``, in channels_last."""
        # The operator brings it to channels_last. On CUDA both are one pass, but the gradient would be in channels_last, too.
        one_pass = self._cuda and not self.input.requires_grad
        input = self.input.to(self.dtype, memory_format=torch.channels_last if one_pass else torch.preserve_format)
        return torch.ops.fastgan.conv_stack(
            input, self.parameters, self.running, self.layers, self.numbers, **group_arguments(self.process_group)
        )


if _extension.has_kernels("cpu"):

    def _plan(input, parameters, layers, numbers):
        """(shape of the output, elements of raw outputs, elements of statistics), as make_plan in csrc/ops/conv_stack.cpp
        and in cuda_conv_stack_plan.cpp."""
        cuda = input.device.type == "cuda"
        shape, position, raw_size, statistics_size = tuple(input.shape), 0, 0, 0
        count = len(layers) // _INTEGERS
        for i in range(count):
            transposed, *rest = layers[i * _INTEGERS : (i + 1) * _INTEGERS]
            stride, padding, (bias, has_bn, *flags, code) = rest[:2], rest[2:4], rest[4:]
            weight = parameters[position]
            position += 1 + bias + flags[0] + flags[1]
            sides = [
                (side - 1) * s - 2 * p + k if transposed else (side + 2 * p - k) // s + 1
                for side, s, p, k in zip(shape[2:], stride, padding, weight.shape[2:])
            ]
            shape = (shape[0], weight.shape[1 if transposed else 0], *sides)
            invertible = code != ACTIVATION_CODES["leaky_relu"] or numbers[i * _NUMBERS + 2] >= 0
            if cuda:  # raw outputs, and activated ones that are not computed again; mean, invstd, scale and shift
                recomputed = (has_bn or i == 0 and input.shape[1] <= 4) and math.prod(shape) * input.itemsize > _CUDA_SAVED_BYTES
                kept, rows = has_bn + (i + 1 < count and not recomputed), 4
            else:
                kept, rows = int(i + 1 < count or has_bn or not invertible), 2
            raw_size += kept * ((math.prod(shape) + 31) // 32 * 32)
            statistics_size += rows * shape[1] * has_bn
        return shape, raw_size, statistics_size

    @torch.library.register_fake("fastgan::conv_stack_forward")
    def _(input, parameters, running, layers, numbers, save_for_backward, process_group="", processes=1):
        shape, raw_size, statistics_size = _plan(input, parameters, layers, numbers)
        output = torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=torch.channels_last)
        if not save_for_backward:
            raw_size = statistics_size = 0
        return output, input.new_empty([raw_size]), input.new_empty([statistics_size], dtype=torch.float32)

    @torch.library.register_fake("fastgan::conv_stack_backward")
    def _(
        grad_output, input, parameters, output, raw, statistics, layers, numbers, output_mask, process_group="", processes=1
    ):
        # The gradient of the images is in channels_last, as they are between the layers.
        formats = [torch.channels_last, *[torch.preserve_format] * len(parameters)]
        return [
            torch.empty_like(t, memory_format=memory_format) if wanted else t.new_empty([0])
            for t, wanted, memory_format in zip([input, *parameters], output_mask, formats)
        ]
