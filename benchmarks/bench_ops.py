"""Times every operator of the convolution family on the layers of a 64-pixel DCGAN, beside plain PyTorch.

    pytest benchmarks/bench_ops.py --benchmark-enable --benchmark-group-by=group
    pytest benchmarks/bench_ops.py --benchmark-enable -k 'conv2d_bn_act and backward' --benchmark-json=results.json

A group is one operator, layer, dtype and direction; in it fastgan is timed next to PyTorch in both memory formats,
after its result was compared with theirs. `backward` is forward and backward together. pytest-benchmark writes the
machine and the date into its JSON.
"""

from dataclasses import dataclass

import pytest
import torch

from fastgan import ops
from fastgan.ops.conv2d_bn_act import conv2d_act_reference, conv2d_bn_act_reference
from fastgan.ops.conv_transpose2d_bn_act import conv_transpose2d_act_reference, conv_transpose2d_bn_act_reference

BATCH = 64
REFERENCES = {
    ops.conv2d_bn_act: conv2d_bn_act_reference,
    ops.conv2d_act: conv2d_act_reference,
    ops.conv_transpose2d_bn_act: conv_transpose2d_bn_act_reference,
    ops.conv_transpose2d_act: conv_transpose2d_act_reference,
}
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Layer:
    op: object
    channels_in: int
    channels_out: int
    size: int  # height and width of the input
    stride: int = 2
    padding: int = 1

    def __str__(self):
        return f"{self.op.__name__}-{self.channels_in}x{self.size}x{self.size}-to-{self.channels_out}"

    def tensors(self, dtype, memory_format):
        torch.manual_seed(0)
        transposed = "transpose" in self.op.__name__
        channels = (self.channels_in, self.channels_out) if transposed else (self.channels_out, self.channels_in)
        tensors = {
            "input": torch.randn(BATCH, self.channels_in, self.size, self.size).to(memory_format=memory_format),
            "weight": (torch.randn(*channels, 4, 4) * 0.02).to(memory_format=memory_format),
        }
        if self.op.__name__.endswith("bn_act"):
            tensors |= {"bn_weight": torch.ones(self.channels_out), "bn_bias": torch.zeros(self.channels_out)}
        return {name: tensor.to(dtype).requires_grad_() for name, tensor in tensors.items()}


LAYERS = [
    # the generator, from its input
    Layer(ops.conv_transpose2d_bn_act, 100, 512, 1, stride=1, padding=0),
    Layer(ops.conv_transpose2d_bn_act, 512, 256, 4),
    Layer(ops.conv_transpose2d_bn_act, 256, 128, 8),
    Layer(ops.conv_transpose2d_bn_act, 128, 64, 16),
    Layer(ops.conv_transpose2d_act, 64, 3, 32),
    # the discriminator
    Layer(ops.conv2d_act, 3, 64, 64),
    Layer(ops.conv2d_bn_act, 64, 128, 32),
    Layer(ops.conv2d_bn_act, 128, 256, 16),
    Layer(ops.conv2d_bn_act, 256, 512, 8),
    Layer(ops.conv2d_act, 512, 1, 4, stride=1, padding=0),
]


def make_call(layer, peer, dtype, direction):
    """A function that makes the call and returns what it computed."""
    memory_format = torch.contiguous_format if peer == "pytorch" else torch.channels_last
    function = layer.op if peer == "fastgan" else REFERENCES[layer.op]
    tensors = layer.tensors(dtype, memory_format)
    options = {"stride": layer.stride, "padding": layer.padding}
    if direction == "forward":

        @torch.no_grad()
        def call():
            return [function(**tensors, **options)]
    else:
        gradient = torch.randn_like(function(**tensors, **options), memory_format=torch.contiguous_format)

        def call():
            output = function(**tensors, **options)
            return [output, *torch.autograd.grad(output, list(tensors.values()), gradient)]

    return call


@pytest.mark.parametrize("peer", ["fastgan", "pytorch", "pytorch_channels_last"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_layer(benchmark, layer, dtype, direction, peer):
    benchmark.group = f"{layer} {dtype} {direction}"
    call = make_call(layer, peer, dtype, direction)
    for found, expected in zip(call(), make_call(layer, "pytorch", dtype, direction)()):
        assert (found - expected).norm() <= TOLERANCE[dtype] * expected.norm().clamp_min(1e-6), benchmark.group
    benchmark(call)
