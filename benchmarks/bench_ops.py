"""Times every operator beside plain PyTorch: the convolution family on the layers of a 64-pixel DCGAN, the entropies of a
CatGAN's loss, and what a perceptron's layer does after its matrix product.

    pytest benchmarks/bench_ops.py --benchmark-enable --benchmark-group-by=group
    pytest benchmarks/bench_ops.py --benchmark-enable -k 'conv2d_bn_act and backward' --benchmark-json=results.json

A group is one operator, layer, dtype and direction; in it fastgan is timed next to PyTorch (a convolution in both
memory formats), after its result was compared with theirs. `backward` is forward and backward together. bfloat16 is autocast's: of
a convolution the images, with parameters in float32. pytest-benchmark
writes the machine and the date into its JSON, and with every convolution GFLOP/s (of direct convolution), its share of the
machine's peak (the best float32 matrix product), the bytes that have to move and GB/s. `python benchmarks/suite.py` makes
a table of it.
"""

import functools
from dataclasses import dataclass

import pytest
import torch
from roofline import measured_peak

from fastgan import ops
from fastgan.ops.batch_norm_act_noise import batch_norm_act_noise_reference
from fastgan.ops.conv2d_bn_act import conv2d_act_reference, conv2d_bn_act_reference
from fastgan.ops.conv_transpose2d_bn_act import conv_transpose2d_act_reference, conv_transpose2d_bn_act_reference
from fastgan.ops.softmax_entropy import softmax_entropy_reference

BATCH = 64
REFERENCES = {
    ops.conv2d_bn_act: conv2d_bn_act_reference,
    ops.conv2d_act: conv2d_act_reference,
    ops.conv_transpose2d_bn_act: conv_transpose2d_bn_act_reference,
    ops.conv_transpose2d_act: conv_transpose2d_act_reference,
}
peak = functools.cache(measured_peak)
# Relative, of a tensor's norm. An element whose value before the activation is 0 but for rounding may take the other slope:
# one such element is a thousandth of the norm of a bias's gradient.
TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 5e-2}
HAS_BFLOAT16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()


@dataclass(frozen=True)
class Layer:
    op: object
    channels_in: int
    channels_out: int
    size: int  # height and width of the input
    stride: int = 2
    padding: int = 1
    batch: int = BATCH

    def __str__(self):
        return f"{self.op.__name__}-{self.channels_in}x{self.size}x{self.size}-to-{self.channels_out}"

    @property
    def output_size(self):
        size = self.size + 2 * self.padding - 4
        return (self.size - 1) * self.stride - 2 * self.padding + 4 if "transpose" in self.op.__name__ else size // self.stride + 1

    def flops(self, direction):
        """As direct convolution counts; `backward` is the forward pass and both gradients."""
        pixels = min(self.size, self.output_size) ** 2 if self.stride == 2 else 1  # what each of the 16 taps multiplies
        return (1 if direction == "forward" else 3) * 2 * 16 * self.channels_in * self.channels_out * self.batch * pixels

    def bytes(self, direction, itemsize):
        """What cannot stay in cache: every tensor read or written once; `backward` adds the gradients and both reads."""
        elements = self.batch * (self.channels_in * self.size**2 + self.channels_out * self.output_size**2)
        elements += 16 * self.channels_in * self.channels_out
        return (1 if direction == "forward" else 3) * elements * itemsize

    def tensors(self, dtype, memory_format, weight_format):
        torch.manual_seed(0)
        transposed = "transpose" in self.op.__name__
        channels = (self.channels_in, self.channels_out) if transposed else (self.channels_out, self.channels_in)
        tensors = {
            "input": torch.randn(self.batch, self.channels_in, self.size, self.size).to(memory_format=memory_format),
            "weight": (torch.randn(*channels, 4, 4) * 0.02).to(memory_format=weight_format),
        }
        if self.op.__name__.endswith("bn_act"):
            tensors |= {"bn_weight": torch.ones(self.channels_out), "bn_bias": torch.zeros(self.channels_out)}
        tensors["input"] = tensors["input"].to(dtype)
        return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


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
    # fastgan's modules keep weights in the default format; PyTorch's in channels_last take them in that.
    weight_format = torch.channels_last if peer == "pytorch_channels_last" else torch.contiguous_format
    tensors = layer.tensors(dtype, memory_format, weight_format)

    def forward():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return function(**tensors, stride=layer.stride, padding=layer.padding)

    if direction == "forward":

        @torch.no_grad()
        def call():
            return [forward()]
    else:
        gradient = torch.randn_like(forward(), memory_format=torch.contiguous_format)

        def call():
            output = forward()
            return [output, *torch.autograd.grad(output, list(tensors.values()), gradient)]

    return call


@pytest.mark.parametrize("peer", ["fastgan", "pytorch", "pytorch_channels_last"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("dtype", [
    pytest.param(torch.float32, id="float32"),
    pytest.param(torch.bfloat16, id="bfloat16", marks=pytest.mark.skipif(
        not HAS_BFLOAT16, reason="this processor has no bfloat16 products: they are emulated, slowly, by both")),
])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_layer(benchmark, layer, dtype, direction, peer):
    benchmark.group = f"{layer} {dtype} {direction}"
    call = make_call(layer, peer, dtype, direction)
    for found, expected in zip(call(), make_call(layer, "pytorch", dtype, direction)()):
        assert (found - expected).norm() <= TOLERANCE[dtype] * expected.norm().clamp_min(1e-6), benchmark.group
    benchmark(call)
    if benchmark.stats is not None:  # None under --benchmark-disable
        speed = layer.flops(direction) / benchmark.stats.stats.median / 1e9
        moved = layer.bytes(direction, dtype.itemsize)
        benchmark.extra_info |= {
            "GFLOP/s": round(speed, 1),
            "share of peak": round(speed / peak(), 3),
            "bytes": moved,
            "GB/s": round(moved / benchmark.stats.stats.median / 1e9, 2),
        }


def assert_close(found, expected, group):
    for ours, theirs in zip(found, expected):
        assert (ours - theirs).norm() <= TOLERANCE[torch.float32] * theirs.norm().clamp_min(1e-6), group


@pytest.mark.parametrize("peer", ["fastgan", "pytorch"])
@pytest.mark.parametrize("rows", [100, 1_000_000])
def test_softmax_entropy(benchmark, rows, peer):
    """Forward and backward of both entropies, of 10 classes."""
    benchmark.group = f"softmax_entropy-{rows}x10 torch.float32 backward"
    torch.manual_seed(0)
    logits = (2 * torch.randn(rows, 10)).requires_grad_()
    gradients = torch.ones(()), -torch.ones(())

    def run(function):
        values = function(logits)
        return [*values, *torch.autograd.grad(values, logits, gradients)]

    assert_close(run(ops.softmax_entropy), run(softmax_entropy_reference), benchmark.group)
    benchmark(run, ops.softmax_entropy if peer == "fastgan" else softmax_entropy_reference)


@pytest.mark.parametrize("peer", ["fastgan", "pytorch"])
@pytest.mark.parametrize("noise_std", [0.0, 0.5])
def test_batch_norm_act_noise(benchmark, noise_std, peer):
    """Forward and backward of batch norm, leaky ReLU and noise on 200 x 1000."""
    benchmark.group = f"batch_norm_act_noise-200x1000-{noise_std} torch.float32 backward"
    torch.manual_seed(0)
    tensors = [torch.randn(200, 1000), torch.rand(1000) + 0.5, torch.randn(1000)]
    tensors = [tensor.requires_grad_() for tensor in tensors]
    gradient = torch.randn(200, 1000)

    def run(function, std):
        output = function(*tensors, noise_std=std)
        return [output, *torch.autograd.grad(output, tensors, gradient)]

    functions = {"fastgan": ops.batch_norm_act_noise, "pytorch": batch_norm_act_noise_reference}
    assert_close(run(functions["fastgan"], 0.0), run(functions["pytorch"], 0.0), benchmark.group)
    benchmark(run, functions[peer], noise_std)
