"""conv_stack on CUDA, without a GPU: csrc/ops/cuda_conv_stack.cpp and the kernels it launches, compiled for the host
(csrc/cuda/host) as operators for tensors on the CPU, against PyTorch's layers."""

import copy

import pytest
import torch
from test_conv_stack import down, stack_call, up
from test_cuda_host import pytestmark  # noqa: F401
from torch import nn
from torch._subclasses import FakeTensorMode

from fastgan.ops import conv_stack


@pytest.fixture
def operators(cuda_host):
    return cuda_host


def from_pixel(c_in, c_out, bias=False):
    return nn.ConvTranspose2d(c_in, c_out, 4, 1, 0, bias=bias)


def to_pixel(c_in, c_out, bias=False):
    return nn.Conv2d(c_in, c_out, 4, 1, 0, bias=bias)


# name -> (layers, input shape)
NETWORKS = {
    "generator": (lambda: [
        from_pixel(10, 32), nn.BatchNorm2d(32), nn.ReLU(True), up(32, 16), nn.BatchNorm2d(16), nn.ReLU(True),
        up(16, 8), nn.BatchNorm2d(8), nn.ReLU(True), up(8, 3), nn.Tanh()], (3, 10, 1, 1)),
    "discriminator": (lambda: [
        down(3, 8), nn.LeakyReLU(0.2, True), down(8, 16), nn.BatchNorm2d(16), nn.LeakyReLU(0.2, True),
        down(16, 32), nn.BatchNorm2d(32), nn.LeakyReLU(0.2, True), to_pixel(32, 1)], (3, 3, 32, 32)),
    "biases everywhere": (lambda: [
        down(1, 8, True), nn.LeakyReLU(0.1), down(8, 16, True), nn.BatchNorm2d(16), nn.ReLU(), down(16, 8, True),
        up(8, 16, True), nn.ReLU(), down(16, 8, True), to_pixel(8, 5, True)], (2, 1, 32, 32)),
    "odd channels and sizes": (lambda: [
        down(3, 7, True), nn.BatchNorm2d(7, affine=False), nn.LeakyReLU(-0.3), down(7, 5), nn.ReLU(),
        up(5, 9), nn.BatchNorm2d(9, track_running_stats=False), nn.Sigmoid(), down(9, 3), nn.BatchNorm2d(3), nn.Tanh(),
        up(3, 1, True), nn.Sigmoid()], (3, 3, 15, 13)),
    "batch norm at the end": (lambda: [up(4, 6), nn.ReLU(), up(6, 6, True), nn.BatchNorm2d(6, momentum=0.3)], (2, 4, 3, 2)),
    "bias and identity at the end": (lambda: [from_pixel(3, 8, True), nn.LeakyReLU(0.2), up(8, 2, True)], (2, 3, 1, 1)),
    "parts of unequal size": (lambda: [
        down(3, 8), nn.LeakyReLU(0.2), down(8, 16), nn.BatchNorm2d(16), nn.ReLU(), down(16, 8)], (3, 3, 16, 24)),
    "two layers": (lambda: [down(3, 8), nn.LeakyReLU(0.2), down(8, 16), nn.BatchNorm2d(16)], (3, 3, 16, 24)),
    "one layer": (lambda: [down(2, 4, True), nn.LeakyReLU(0.2)], (2, 2, 4, 4)),
    "tiles of 128": (lambda: [up(72, 136), nn.BatchNorm2d(136), nn.ReLU(), down(136, 72)], (9, 72, 4, 4)),
}  # fmt: skip


def build(name, training=True, layout=torch.contiguous_format):
    torch.manual_seed(0)
    layers, shape = NETWORKS[name]
    network = nn.Sequential(*layers()).train(training)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            if module.affine:
                nn.init.normal_(module.weight, 1.0, 0.3)
                nn.init.normal_(module.bias, 0.0, 0.3)
            if module.track_running_stats:
                nn.init.normal_(module.running_mean, 0.0, 0.1)
                nn.init.uniform_(module.running_var, 0.2, 2.0)
    network.to(memory_format=layout)
    return network, torch.randn(shape).contiguous(memory_format=layout)


def step(network, x, dtype):
    """[output, gradients of x and of all parameters] by PyTorch."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        output = network(x)
    return [output.detach(), *torch.autograd.grad(output, [x, *network.parameters()], grad_of(output))]


def grad_of(output):
    return torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)


def host_step(operators, network, x, dtype, mask=None):
    """The same by the operators; gradients that mask leaves out are None."""
    call = stack_call(network, x.to(dtype))
    parameters = [p.detach() for p in call.parameters]
    arguments = (call.input, parameters, list(call.running), call.layers, call.numbers)
    output, raw, statistics = operators.conv_stack_forward(*arguments, True)
    mask = mask or [1] * (1 + len(parameters))
    gradients = operators.conv_stack_backward(
        grad_of(output), call.input, parameters, output, raw, statistics, call.layers, call.numbers, mask
    )
    for tensor, wanted, gradient in zip([call.input, *parameters], mask, gradients, strict=True):
        assert gradient.shape == (tensor.shape if wanted else (0,)) and gradient.dtype == tensor.dtype
        if wanted and tensor is not call.input:
            assert gradient.stride() == tensor.stride()
    return [output, *(g if m else None for g, m in zip(gradients, mask))]


def assert_close(exact, plain, ours, factor, floor):
    """Errors by norm, at most factor times PyTorch's own but for `floor`, relative to the largest of its kind."""
    largest = [exact[0].norm().item(), max(e.norm().item() for e in exact[1:])]
    for i, (e, p, o) in enumerate(zip(exact, plain, ours, strict=True)):
        theirs, error = ((t.double() - e).norm().item() for t in (p, o))
        assert error <= factor * theirs + floor * largest[min(i, 1)], (i, error, theirs)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_float32_errors_are_those_of_pytorch(operators, name, training, layout):
    network, x = build(name, training, layout)
    ours = copy.deepcopy(network)
    exact = step(copy.deepcopy(network).double(), x.double(), torch.float64)
    assert_close(exact, step(network, x, torch.float32), host_step(operators, ours, x, torch.float32), 4, 1e-6)
    for (key, a), (_, b) in zip(ours.named_buffers(), network.named_buffers()):
        if "batches" not in key:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_bfloat16_errors_are_at_most_twice_pytorchs(operators, name, training):
    network, x = build(name, training)
    ours = copy.deepcopy(network)
    exact = step(copy.deepcopy(network).double(), x.double(), torch.float64)
    assert_close(exact, step(network, x, torch.bfloat16), host_step(operators, ours, x, torch.bfloat16), 2, 2e-3)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", [
    "generator", "discriminator", "biases everywhere", "batch norm at the end", "two layers", "parts of unequal size"
])
def test_gradients_that_are_not_wanted_are_left_out(operators, name, training):
    network, x = build(name, training)
    count = len(list(network.parameters()))
    masks = [
        [1] + [0] * count,  # the discriminator in the generator's step
        [0] + [1] * count,  # the generator
        [0] * count + [1],  # the last layer's last parameter alone
        [0, 1] + [0] * (count - 1),
        [i % 2 for i in range(count + 1)],
        [(i + 1) % 2 for i in range(count + 1)],
        *([int(i == k) for i in range(count + 1)] for k in range(2, count, 2)),
    ]
    expected = step(copy.deepcopy(network), x, torch.float32)
    largest = max(1, *(e.abs().max().item() for e in expected[1:]))
    for mask in masks:
        ours = host_step(operators, copy.deepcopy(network), x, torch.float32, mask)
        for o, e, wanted in zip(ours, expected, [1, *mask], strict=True):
            if wanted:
                torch.testing.assert_close(o, e, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize("name", NETWORKS)
def test_output_is_the_same_without_anything_saved(operators, name):
    network, x = build(name)
    saved, raw, statistics = forward(operators, copy.deepcopy(network), x, True)
    output, nothing, no_statistics = forward(operators, network, x, False)
    assert torch.equal(output, saved) and output.is_contiguous(memory_format=torch.channels_last)
    assert nothing.shape == no_statistics.shape == (0,)


def forward(operators, network, x, save):
    call = stack_call(network, x)
    parameters = [p.detach() for p in call.parameters]
    return operators.conv_stack_forward(call.input, parameters, list(call.running), call.layers, call.numbers, save)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NETWORKS)
def test_no_memory_is_read_before_it_is_written(operators, name, dtype):
    network, x = build(name)
    expected = host_step(operators, copy.deepcopy(network), x, dtype)
    torch.use_deterministic_algorithms(True)  # fills what is allocated with NaN
    try:
        found = host_step(operators, network, x, dtype)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", NETWORKS)
def test_fake_kernels_give_the_shapes_of_the_operators(operators, name, monkeypatch):
    monkeypatch.setattr(conv_stack, "_CUDA_SAVED_BYTES", 2 << 10)  # kSavedBytes where kernels run on the host
    network, x = build(name, layout=torch.channels_last)
    call = stack_call(network, x)
    parameters, running = [p.detach() for p in call.parameters], list(call.running)
    mask = [(i + 1) % 3 for i in range(1 + len(parameters))]

    def run(operators, x, parameters, running):
        results = []
        for save in (False, True):
            results += operators.conv_stack_forward(x, parameters, running, call.layers, call.numbers, save)
        grad, saved = torch.empty_like(results[3]), results[3:]
        results += operators.conv_stack_backward(grad, x, parameters, *saved, call.layers, call.numbers, mask)
        return [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in results]

    expected = run(operators, x, parameters, running)
    with FakeTensorMode():
        fakes = [[torch.empty_strided(t.shape, t.stride(), device="cuda") for t in ts] for ts in ([x], parameters, running)]
        assert run(torch.ops.fastgan, fakes[0][0], *fakes[1:]) == expected


def test_mean_and_invstd_stand_where_the_second_derivative_reads_them(operators):
    network, x = build("discriminator")
    statistics = forward(operators, network, x, True)[2]
    offset = 0
    with torch.no_grad():
        for module in network:
            if isinstance(module, nn.BatchNorm2d):
                var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
                expected = torch.cat([mean, (var + module.eps).rsqrt()])
                torch.testing.assert_close(statistics[offset : offset + len(expected)], expected, rtol=1e-4, atol=1e-5)
                offset += len(expected)
            x = module(x)
    assert statistics.numel() == 2 * offset  # then scale and shift


@pytest.mark.parametrize("layers, message", [
    (lambda: [nn.Conv2d(2, 4, 3)], "layer 0 has weight"),
    (lambda: [to_pixel(2, 4)], "from or to one pixel"),
    (lambda: [down(2, 4), nn.Tanh(), down(4, 4)], "the activation of layer 0 needs batch norm"),
    (lambda: [down(2, 4), nn.LeakyReLU(-0.1)], "the activation of layer 0 needs batch norm"),
])  # fmt: skip
def test_what_it_does_not_take_is_an_error(operators, layers, message):
    with pytest.raises(NotImplementedError, match=message):
        forward(operators, nn.Sequential(*layers()), torch.randn(2, 2, 8, 8), True)
