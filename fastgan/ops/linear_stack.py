"""A run of a perceptron's layers as one operator: how fuse() executes them on the CPU, from end to end.

Not public: :func:`fastgan.fuse` decides when it applies. csrc/ops/linear_stack.cpp says what it saves, csrc/cpu/linear.h how it computes.
"""

import torch

from fastgan import _extension
from fastgan.ops._conv import ACTIVATION_CODES

_INTEGERS, _NUMBERS = 8, 4  # a layer, as in csrc/ops/linear_stack.cpp
# Where the operator was measured to be faster than its layers one by one (benchmarks/bench_perceptron.py): batches whose vectors of rows
# are neither half empty nor longer than the cache likes, and weights that outweigh the call.
_FEWEST_ROWS, _MOST_ROWS = 12, 256
_WEIGHTS, _WEIGHTS_WITH_NORM = 2**18, 2**15


def linear_stack_gains(rows, weights, has_norm):
    """Whether a run with so many parameters is faster by the operator than layer by layer."""
    return _FEWEST_ROWS <= rows <= _MOST_ROWS and weights > (_WEIGHTS_WITH_NORM if has_norm else _WEIGHTS)


class LinearStackCall:
    """Collects the arguments of one call, layer by layer.

    Args:
        input: ``[N, C]``, float32 on the CPU.
        noise_std: standard deviation of the noise on it.
    """

    def __init__(self, input, noise_std):
        self.input, self.features = input, input.shape[1]
        self.parameters, self.running, self.layers, self.numbers = [], [], [], [noise_std]
        self.weights = 0  # numbers in parameters

    def add(self, linear, bn, uses_batch, running, counter, momentum, activation, negative_slope, noise_std):
        """Adds a layer. False, and nothing is added, if the operator does not take it.

        Args:
            linear: nn.Linear.
            bn: nn.BatchNorm1d or None.
            uses_batch: whether batch norm normalises by the statistics of the batch.
            running: (running_mean, running_var), or () where there are none to use or update.
            counter: int64 [], which the operator counts up, or None.
            momentum: of the running statistics.
            noise_std: standard deviation of the noise on the layer's output.
        """
        weight, bias, bn_weight, bn_bias = linear.weight, linear.bias, None, None
        if bn is not None:
            bn_weight, bn_bias = bn.weight, bn.bias
        if not (weight.dtype == torch.float32 and weight.is_cpu and weight.dim() == 2):
            return False
        outputs, inputs = weight.shape
        if inputs != self.features or inputs * outputs == 0:
            return False
        arrays = [t for t in (bias, bn_weight, bn_bias, *running) if t is not None]
        for t in arrays:
            if not (t.dtype == torch.float32 and t.is_cpu and t.shape == (outputs,)):
                return False
        if not all([t.is_contiguous() for t in running]):
            return False
        self.features = outputs
        self.weights += inputs * outputs + (len(arrays) - len(running)) * outputs
        self.parameters += (weight, *arrays[: len(arrays) - len(running)])
        self.running += running if counter is None else (*running, counter)
        flags = [
            bias is not None, bn is not None, bn_weight is not None, bn_bias is not None, len(running) > 0, uses_batch,
            counter is not None,
        ]  # fmt: skip
        self.layers += [*map(int, flags), ACTIVATION_CODES[activation]]
        self.numbers += [momentum, bn.eps if bn is not None else 0.0, negative_slope, noise_std]
        return True

    @property
    def gains(self):
        """Whether the call is faster than its layers one by one."""
        return linear_stack_gains(self.input.shape[0], self.weights, any(self.layers[1::_INTEGERS]))

    def run(self):
        """``[N, C]``."""
        noisy = self.numbers[0] or any(self.numbers[_NUMBERS::_NUMBERS])
        count = len(self.layers) // _INTEGERS
        seeds = torch.randint(2**62, (count + 1,)) if noisy else torch.empty(0, dtype=torch.int64)
        return torch.ops.fastgan.linear_stack(self.input, self.parameters, self.running, seeds, self.layers, self.numbers)


if _extension.has_kernels("cpu"):

    def _stride(count):
        """linear_stride in csrc/cpu/linear.h."""
        lines = (count + 15) // 16
        return (lines + 1 - lines % 2) * 16

    @torch.library.register_fake("fastgan::linear_stack_forward")
    def _(input, parameters, running, seeds, layers, numbers, save):
        rows, features, position, saved = input.shape[0], input.shape[1], 0, 0
        for i in range(len(layers) // _INTEGERS):
            bias, has_bn, bn_weight, bn_bias, _, _, _, activation = layers[i * _INTEGERS : (i + 1) * _INTEGERS]
            weight = parameters[position]
            position += 1 + bias + bn_weight + bn_bias
            if save > 1:
                saved += rows * _stride(features)
            features = weight.shape[0]
            if save > 0 and has_bn:
                saved += (2 * features + 15) // 16 * 16
            if save > 0 and (has_bn or activation != 0):
                saved += features * _stride(rows)
        return input.new_empty([rows, features]), input.new_empty([saved])

    @torch.library.register_fake("fastgan::linear_stack_backward")
    def _(grad_output, input, parameters, saved, layers, numbers, save, output_mask):
        return [
            torch.empty_like(t, memory_format=torch.contiguous_format) if wanted else t.new_empty([0])
            for t, wanted in zip([input, *parameters], output_mask)
        ]
