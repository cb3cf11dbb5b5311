"""conv_stack: a whole Sequential as one operator (what fuse() runs) against the plain layers."""

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastgan
from fastgan import _extension, ops
from fastgan.nn._runs import images_in_channels_last, match_layer
from fastgan.nn.modules import BatchNormCall
from fastgan.ops._gradients import gradients_added_in_place
from fastgan.ops.conv_stack import StackCall


def up(c_in, c_out, bias=False):
    return nn.ConvTranspose2d(c_in, c_out, 4, 2, 1, bias=bias)


def down(c_in, c_out, bias=False):
    return nn.Conv2d(c_in, c_out, 4, 2, 1, bias=bias)


# name -> (layers, input shape)
NETWORKS = {
    "one up": (lambda: [up(64, 32, True)], (3, 64, 4, 4)),
    "one down": (lambda: [down(32, 48), nn.BatchNorm2d(48), nn.Sigmoid()], (3, 32, 8, 8)),
    "batch norm at the end": (lambda: [down(16, 32), nn.BatchNorm2d(32)], (3, 16, 8, 8)),
    "negative slope below 0 at the end": (lambda: [down(16, 32), nn.LeakyReLU(-0.5)], (3, 16, 8, 8)),
    "generator": (lambda: [
        nn.ConvTranspose2d(10, 64, 4, 1, 0, bias=False), nn.BatchNorm2d(64), nn.ReLU(True),
        up(64, 32), nn.BatchNorm2d(32), nn.ReLU(True), up(32, 16, True), nn.BatchNorm2d(16, momentum=None), nn.ReLU(),
        up(16, 3, True), nn.Tanh()], (4, 10, 1, 1)),
    "discriminator": (lambda: [
        down(3, 16, True), nn.LeakyReLU(0.2, True), down(16, 32), nn.BatchNorm2d(32), nn.LeakyReLU(0.2, True),
        down(32, 64, True), nn.BatchNorm2d(64, affine=False), nn.LeakyReLU(0.1), nn.Conv2d(64, 1, 4, 1, 0)], (4, 3, 32, 32)),
    "odd sizes 28 to 7": (lambda: [
        down(1, 16), nn.LeakyReLU(0.2), down(16, 32), nn.BatchNorm2d(32, track_running_stats=False), nn.LeakyReLU(0.2),
        nn.Conv2d(32, 2, 7)], (5, 1, 28, 28)),
    "one pixel without batch norm before it": (lambda: [
        down(3, 16, True), nn.LeakyReLU(0.2), nn.Conv2d(16, 3, 4), nn.BatchNorm2d(3), nn.Sigmoid()], (5, 3, 8, 8)),
    "7 to 28": (lambda: [
        nn.ConvTranspose2d(6, 32, 7), nn.BatchNorm2d(32), nn.ReLU(), up(32, 16), nn.BatchNorm2d(16), nn.ReLU(),
        up(16, 1), nn.Tanh()], (5, 6, 1, 1)),
    "other kernels between": (lambda: [
        nn.Conv2d(4, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), down(16, 32), nn.BatchNorm2d(32), nn.Tanh(),
        nn.ConvTranspose2d(32, 20, 3, 2, 1), nn.LeakyReLU(0.3), nn.Conv2d(20, 16, 1), nn.ReLU(), down(16, 16)], (2, 4, 16, 12)),
    "channels that fit no tile": (lambda: [down(5, 24), nn.ReLU(), down(24, 32), nn.ReLU(), down(32, 16)], (3, 5, 32, 32)),
}  # fmt: skip

# Those with other kernels, or a derivative that the output alone does not give, run layer by layer on CUDA, and all in float32.
NOT_ON_CUDA = {"negative slope below 0 at the end", "odd sizes 28 to 7", "7 to 28", "other kernels between"}


def build(name, seed=0, device="cpu"):
    torch.manual_seed(seed)
    layers, shape = NETWORKS[name]
    network = nn.Sequential(*layers())
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.bias, 0.0, 0.3)
    return network.to(device), torch.randn(shape).to(device)


def is_one_operator(name, device, dtype=torch.float32):
    return device.type == "cpu" or name not in NOT_ON_CUDA and dtype != torch.float32


def stack_call(network, x):
    """The arguments with which fuse() calls the operator for a whole network."""
    stack, children, position = StackCall(x, x.dtype), list(network), 0
    while position < len(children):
        layer = match_layer(children, position)
        bn = BatchNormCall(layer.bn) if layer.bn is not None else None
        state = (bn.uses_batch, bn.running, bn.momentum) if bn else (False, (), 0.0)
        assert stack.add(layer.conv, layer.bn, *state, layer.activation, layer.negative_slope)
        position += layer.length
    return stack


def step(network, x, grad_seed=1):
    x = x.clone().requires_grad_()
    output = network(x)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(grad_seed)).to(output)
    return [output.detach(), *torch.autograd.grad(output, [x, *network.parameters()], grad)]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("training", [True, False])
def test_error_against_float64_is_at_most_four_times_pytorchs(name, training, device):
    network, x = build(name, device=device)
    network(x)  # running statistics other than their initial values
    network.train(training)
    fused = fastgan.fuse(copy.deepcopy(network))
    exact = step(copy.deepcopy(network).double(), x.double())
    plain, ours = step(network, x), step(fused, x)
    if _extension.has_kernels(device.type):
        assert ("conv_stack" in kernels_of(lambda: copy.deepcopy(fused)(x))) == is_one_operator(name, device)
    # Rounding goes by the largest value of its kind: outputs, or gradients (some are 0 but for rounding).
    largest = [exact[0].abs().max().item(), max(g.abs().max().item() for g in exact[1:])]
    for i, (e, p, o) in enumerate(zip(exact, plain, ours)):
        theirs, error = (p.double() - e).abs().max().item(), (o.double() - e).abs().max().item()
        assert error <= 4 * theirs + 1e-6 * largest[min(i, 1)], (i, error, theirs)
    for ours_buffer, buffer in zip(fused.buffers(), network.buffers(), strict=True):
        torch.testing.assert_close(ours_buffer, buffer, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not _extension.has_kernels("cpu"), reason="compares fastgan's CPU kernels with PyTorch's")
@pytest.mark.parametrize("side, large, small", [(4, 128, 256), (7, 64, 128), (8, 128, 256), (16, 64, 128)])
@pytest.mark.parametrize("transposed", [False, True])
def test_error_of_a_layer_and_its_gradients_is_at_most_three_times_pytorchs(side, large, small, transposed):
    generator = torch.Generator().manual_seed(side)
    sizes = [(16, large, 2 * side, 2 * side), (16, small, side, side)]
    x, gradient = (torch.randn(size, generator=generator).relu() for size in sizes[:: -1 if transposed else 1])
    weight = torch.randn(small, large, 4, 4, generator=generator) / 50

    def outputs(convolution, dtype=torch.float32, **options):
        tensors = [t.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_() for t in (x, weight)]
        y = convolution(*tensors, None, stride=2, padding=1, **options)
        return [t.double() for t in (y.detach(), *torch.autograd.grad(y, tensors, gradient.to(y)))]

    plain = F.conv_transpose2d if transposed else F.conv2d
    ours = ops.conv_transpose2d_act if transposed else ops.conv2d_act
    # PyTorch's of contiguous tensors: in channels_last its errors are larger.
    tensors = [t.clone().requires_grad_() for t in (x, weight)]
    y = plain(*tensors, None, stride=2, padding=1)
    theirs = [t.double() for t in (y.detach(), *torch.autograd.grad(y, tensors, gradient))]
    for exact, found, other in zip(outputs(plain, torch.float64), outputs(ours, activation="identity"), theirs):
        assert (found - exact).norm() <= 3 * (other - exact).norm()
        assert (found - exact).abs().max() <= 3 * (other - exact).abs().max()


@pytest.mark.parametrize("name", ["generator", "discriminator", "other kernels between"])
def test_gradient_penalty_through_the_stack(name, device):
    network, x = build(name, device=device)
    fused = fastgan.fuse(copy.deepcopy(network))
    results = []
    for module in (network, fused):
        inputs = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(module(inputs).sum(), inputs, create_graph=True)
        penalty = gradient.pow(2).sum()
        results.append([penalty, *torch.autograd.grad(penalty, list(module.parameters()), allow_unused=True)])
    scale = max(g.abs().max().item() for g in results[0] if g is not None)
    for ours, theirs in zip(*reversed(results)):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5 * scale)


def test_frozen_layers_get_no_gradient_and_do_not_disturb_the_others(device):
    network, x = build("discriminator", device=device)
    expected = step(network, x)
    fused = fastgan.fuse(copy.deepcopy(network)).requires_grad_(False)
    inputs = x.clone().requires_grad_()
    output = fused(inputs)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    torch.testing.assert_close(torch.autograd.grad(output, inputs, grad)[0], expected[1], rtol=1e-4, atol=1e-6)
    fused[-1].requires_grad_(True)  # only the last layer learns, the input needs no gradient
    (gradient,) = torch.autograd.grad(fused(x), fused[-1].weight, grad)
    torch.testing.assert_close(gradient, expected[-2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_eval_mode_without_a_graph_matches_plain_layers_and_the_pass_with_one(name):
    """Where nothing is saved for backward, batch norm and activation are applied where a layer is written."""
    network, x = build(name)
    for module in network:
        if isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    network.eval()
    fused = fastgan.fuse(copy.deepcopy(network))
    with torch.no_grad():
        output, expected = fused(x), network(x)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output, fused(x.clone().requires_grad_()).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not _extension.has_kernels("cpu"), reason="no compiled kernels")
@pytest.mark.parametrize("autocast", (False, True))
def test_gradients_added_in_place(autocast):
    """The bits of separate additions, without the weights' tensors; hooks and torch.autograd.grad still see what is added."""
    network, images = build("discriminator")
    network, images = fastgan.fuse(network), torch.cat([images] * 5)

    def loss():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return network(images).float().square().sum()

    def gradients(in_place, passes=2):
        network.zero_grad()
        for _ in range(passes):
            with gradients_added_in_place() if in_place else contextlib.nullcontext():
                loss().backward()
        return [parameter.grad.clone() for parameter in network.parameters() if parameter.requires_grad]

    expected = gradients(False)
    assert all(torch.equal(a, b) for a, b in zip(gradients(True), expected))

    def additions(in_place):
        with torch.profiler.profile() as profiler:
            gradients(in_place)
        return sum(event.count for event in profiler.key_averages() if event.key == "aten::add_")

    assert additions(True) == additions(False) - 3  # the three layers that can

    weight = network[2].weight
    before, seen = weight.grad.clone(), []
    with gradients_added_in_place():  # of all weights: one that only one loop reads would not be rounded to bfloat16 before it
        weights = {name: tensor for name, tensor in network.named_parameters() if tensor.requires_grad}
        alone = dict(zip(weights, torch.autograd.grad(loss(), weights.values())))["2.weight"]
    assert torch.equal(weight.grad, before) and alone.abs().sum() > 0
    with weight.register_hook(seen.append), gradients_added_in_place():
        loss().backward()
    assert torch.equal(seen[0], alone) and torch.equal(weight.grad, before + alone)


@pytest.mark.skipif(not _extension.has_kernels("cpu"), reason="no compiled kernels")
@pytest.mark.parametrize("autocast", (False, True))
@pytest.mark.parametrize("kind", ("discriminator", "generator"))
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_gradients_put_off(kind, autocast, memory_format):
    """Gradients of large weights on loops of fastgan's own are computed when the context ends, with the bits of separate additions."""
    torch.manual_seed(0)
    if kind == "discriminator":
        layers = [
            down(3, 32, True), nn.LeakyReLU(0.2), down(32, 128), nn.BatchNorm2d(128), nn.LeakyReLU(0.2), nn.Conv2d(128, 1, 2)
        ]  # fmt: skip
        images, large = torch.randn(16, 3, 8, 8), 2
    else:
        layers = [
            nn.ConvTranspose2d(5, 128, 2), nn.ReLU(), up(128, 64), nn.BatchNorm2d(64), nn.ReLU(), up(64, 3, True), nn.Tanh()
        ]  # fmt: skip
        images, large = torch.randn(16, 5, 1, 1), 2
    network = fastgan.fuse(nn.Sequential(*layers)).to(memory_format=memory_format)
    weight = network[large].weight
    # The loops with bfloat16 products take weights in the default format alone: their gradients are then copied, and not put off.
    waits = not autocast or memory_format is torch.contiguous_format or _extension.CPU_ISA not in ("avx512_bf16", "amx")

    def loss():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return network(images).float().square().sum()

    loss().backward()
    once = weight.grad.clone()
    for _ in range(3):
        loss().backward()
    expected = [parameter.grad for parameter in network.parameters()]
    network.zero_grad()
    for passes in (2, 2):  # from no gradient, and added to one
        with gradients_added_in_place(put_off=True):
            before = None if weight.grad is None else weight.grad.clone()
            for _ in range(passes):
                loss().backward()
            unchanged = weight.grad is None if before is None else torch.equal(weight.grad, before)
            assert unchanged == waits
            assert network[0].weight.grad is not None
    assert all(map(torch.equal, (parameter.grad for parameter in network.parameters()), expected))

    before = weight.grad.clone()
    with pytest.raises(ZeroDivisionError), gradients_added_in_place(put_off=True):
        loss().backward()
        raise ZeroDivisionError
    with gradients_added_in_place(put_off=True):
        assert torch.equal(torch.autograd.grad(loss(), [network[0].weight, weight])[1], once)
    assert torch.equal(weight.grad, before if waits else before + once)  # neither added what had to wait
    before = weight.grad.clone()
    with gradients_added_in_place(put_off=True):
        loss().backward()
        with gradients_added_in_place(put_off=True):
            loss().backward()
    torch.testing.assert_close(weight.grad, before + once + once)
    before = weight.grad.clone()
    with gradients_added_in_place(put_off=True):
        with torch.autograd.graph.save_on_cpu():  # backward then meets copies of the parameters
            kept = loss()
        kept.backward()
    torch.testing.assert_close(weight.grad, before + once)
    before, seen = weight.grad.clone(), []
    with weight.register_hook(seen.append), gradients_added_in_place(put_off=True):
        loss().backward()
        assert torch.equal(seen[0], once) and torch.equal(weight.grad, before + once)


@pytest.mark.skipif(not _extension.has_kernels("cpu"), reason="no compiled kernels")
@pytest.mark.parametrize("name", list(NETWORKS))
def test_without_gradients_the_same_bits_and_the_input_as_it_was(name):
    """Batch norm and activation are then applied in the memory of the raw output."""
    network, x = build(name)
    network, x = fastgan.fuse(network), x.to(memory_format=torch.channels_last)
    before, expected = x.clone(), network(x)
    with torch.no_grad():
        assert torch.equal(network(x), expected) and torch.equal(x, before)


@pytest.mark.skipif(not _extension.has_kernels("cpu"), reason="no compiled kernels")
@pytest.mark.parametrize("name", list(NETWORKS))
@pytest.mark.parametrize("autocast, in_place", [(False, False), (False, True), (True, False)])
def test_weights_in_channels_last_give_the_same_bits(name, autocast, in_place):
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        network, x = build(name)
        network = fastgan.fuse(network).to(memory_format=memory_format)
        x.requires_grad_()
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast), gradients_added_in_place() if in_place else contextlib.nullcontext():
                output = network(x)
                output.float().square().sum().backward()
        for parameter in network.parameters():
            assert parameter.dim() < 4 or parameter.grad.is_contiguous(memory_format=memory_format)
        results.append([output, x.grad, *(p.grad for p in network.parameters() if p.grad is not None)])
    for ours, theirs in zip(*results, strict=True):
        if "other" in name or "no tile" in name:  # some layers are PyTorch's, which has a loop for each format
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())
        else:
            assert torch.equal(ours, theirs)


@pytest.mark.skipif(not _extension.has_kernels("cpu"), reason="no compiled kernels")
def test_in_place_gradients_overwrite_activations_that_nobody_reads_again():
    network, images = build("discriminator")
    network, images = fastgan.fuse(network), torch.cat([images] * 5)

    def backward(context, **options):
        loss = network(images).square().sum()
        network.zero_grad()
        with torch.profiler.profile(profile_memory=True) as profiler, context():
            loss.backward(**options)
            for _ in range(len(options)):  # a graph that is kept can be gone through again
                network.zero_grad()
                loss.backward(**options)
        allocated = [event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        return [p.grad.clone() for p in network.parameters() if p.requires_grad], sum(n for n in allocated if n > 0)

    expected, most = backward(contextlib.nullcontext)
    gradients, least = backward(gradients_added_in_place)
    assert all(map(torch.equal, gradients, expected))
    first_activation = 4 * len(images) * network[0].out_channels * (images.shape[2] // 2) ** 2
    assert least <= most - first_activation
    assert all(map(torch.equal, backward(gradients_added_in_place, retain_graph=True)[0], expected))


@pytest.mark.skipif(not _extension.has_kernels("cpu"), reason="no compiled kernels")
def test_kept_memory_is_counted_and_never_shared():
    """csrc/ops/kept_memory.cpp: results that live share no memory, and PyTorch's profiler sees what is given out and returned."""
    network = fastgan.fuse(nn.Sequential(down(16, 32), nn.LeakyReLU(0.2)))
    images = [torch.randn(64, 16, 32, 32).to(memory_format=torch.channels_last) for _ in range(4)]  # 2 MiB a result
    with torch.no_grad():
        expected = [network[1](network[0](x)) for x in images]
        for _ in range(3):  # from the second time on in memory that was kept
            results = [network(x) for x in images]
            assert len({result.data_ptr() for result in results}) == len(images)
            for result, value in zip(results, expected):
                torch.testing.assert_close(result, value, rtol=1e-4, atol=1e-5)
        del result, results
        with torch.profiler.profile(profile_memory=True) as profiler:
            kept = network(images[0])
    assert sum(event.self_cpu_memory_usage for event in profiler.key_averages()) == kept.nbytes
    before = kept.clone()
    kept.resize_(128, 32, 16, 16)  # to twice its memory
    assert torch.equal(kept.as_strided(before.shape, before.stride()), before)


def test_opcheck_and_fake_shapes(device):
    for name in ("discriminator", "generator", "batch norm at the end"):
        network, x = build(name, device=device)
        if device.type == "cuda":  # where the operator takes no float32
            x = x.to(torch.bfloat16, memory_format=torch.channels_last)
        call = stack_call(network, x.requires_grad_())
        arguments = (call.input, call.parameters, list(call.running), call.layers, call.numbers)
        torch.library.opcheck(torch.ops.fastgan.conv_stack, arguments)
        with torch.no_grad():
            for save in (False, True):
                torch.library.opcheck(
                    torch.ops.fastgan.conv_stack_forward, (*arguments, save), test_utils=("test_schema", "test_faketensor")
                )


ONE, EACH = ["conv_stack"], ["conv_act", "conv_bn_act"]


@pytest.mark.skipif(not _extension.has_kernels("cpu"), reason="no compiled kernels")
@pytest.mark.parametrize("layers, autocast, expected", [
    (lambda: [down(3, 5), nn.ReLU(), down(5, 7), nn.BatchNorm2d(7), nn.Tanh()], None, EACH),
    (lambda: [down(3, 5), nn.ReLU(), down(5, 7, True), nn.BatchNorm2d(7), nn.Tanh()], torch.bfloat16, ONE),
    (lambda: [down(3, 5), nn.ReLU(), down(5, 7), nn.BatchNorm2d(7), nn.Tanh()], torch.bfloat16, ONE),
    (lambda: [down(3, 5), nn.ReLU(), down(5, 7), nn.BatchNorm2d(7), nn.Tanh()], torch.float16, ONE),
    (lambda: [down(3, 5), nn.LeakyReLU(0.2), down(5, 7), nn.BatchNorm2d(7), nn.LeakyReLU(-0.2)], torch.bfloat16, ONE),
    (lambda: [down(3, 5), nn.LeakyReLU(-0.2), down(5, 7), nn.BatchNorm2d(7)], torch.bfloat16, EACH[1:]),
    (lambda: [down(3, 5), nn.Tanh(), down(5, 7), nn.BatchNorm2d(7)], torch.bfloat16, EACH),
    (lambda: [down(3, 5), nn.BatchNorm2d(5), nn.Tanh(), nn.Conv2d(5, 7, 4, 1, 0), nn.Sigmoid()], torch.bfloat16, ONE),
    (lambda: [nn.Conv2d(3, 5, 4, 1, 0), nn.ReLU(), down(5, 7), nn.BatchNorm2d(7)], torch.bfloat16, EACH),
    (lambda: [down(3, 5), nn.ReLU(), nn.Conv2d(5, 7, 3), nn.BatchNorm2d(7)], torch.bfloat16, EACH),
])  # fmt: skip
def test_which_runs_are_one_operator_on_cuda(monkeypatch, layers, autocast, expected):
    """fuse() on fake tensors, without a GPU."""
    monkeypatch.setattr(_extension, "_DEVICES", frozenset({"cpu", "cuda"}))
    monkeypatch.setattr(_extension, "why_not_on_gpu", lambda device: None)
    fused, called = fastgan.fuse(nn.Sequential(*layers())), []
    state = fused.state_dict()

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(function.__name__.partition(".")[0])
            return function(*args, **(kwargs or {}))

    with torch._subclasses.FakeTensorMode(), torch.no_grad(), Recorder():
        state = {name: torch.empty(t.shape, dtype=t.dtype, device="cuda") for name, t in state.items()}
        x = torch.empty(4, 3, 8, 8, device="cuda", memory_format=torch.channels_last)
        before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        try:  # torch.autocast does nothing without a GPU
            torch.set_autocast_enabled("cuda", autocast is not None)
            torch.set_autocast_dtype("cuda", autocast or torch.float16)
            output = torch.func.functional_call(fused, state, x)
        finally:
            torch.set_autocast_enabled("cuda", before[0])
            torch.set_autocast_dtype("cuda", before[1])
    assert [name.removesuffix("_forward") for name in called if name.endswith("_forward")] == expected
    assert output.dtype == (autocast or torch.float32) and output.device.type == "cuda"
    assert expected is not ONE or output.is_contiguous(memory_format=torch.channels_last)


def test_runs_are_bit_identical_also_with_another_number_of_threads():
    network, x = build("discriminator")
    fused = fastgan.fuse(network)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (threads, threads, 1):
            torch.set_num_threads(count)
            results.append(step(fused, x))
    finally:
        torch.set_num_threads(threads)
    for first, again, single in zip(*results):
        assert torch.equal(first, again)
        torch.testing.assert_close(single, first, rtol=1e-4, atol=1e-5)


def kernels_of(call):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return {event.name.removeprefix("fastgan::") for event in profile.events() if event.name.startswith("fastgan::")}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["generator", "discriminator", "odd sizes 28 to 7", "other kernels between"])
@pytest.mark.parametrize("batch", [5, 20])  # from 16 on the CPU has loops with products of that dtype
def test_autocast_error_is_at_most_twice_pytorchs(name, dtype, batch, device):
    if device.type == "cpu" and (dtype == torch.float16 or _extension.CPU_ISA == "amx" and batch < 16):
        pytest.skip("no such loops on this machine")
    squares = []  # of the errors of every output and gradient, PyTorch's and ours; of several inputs: one value near a ReLU's 0 can
    for seed in range(4):  # make either's error twice as large
        network, x = build(name, seed, device)
        x = torch.randn(batch, *x.shape[1:], device=device)
        fused = fastgan.fuse(copy.deepcopy(network))
        exact = step(copy.deepcopy(network).double(), x.double())
        with torch.autocast(device.type, dtype):
            one_operator = "conv_stack" in kernels_of(lambda: copy.deepcopy(fused)(x))
            assert one_operator == is_one_operator(name, device, dtype)
            plain, ours = step(network, x), step(fused, x)
        assert ours[0].dtype == dtype and all(g.dtype == torch.float32 for g in ours[1:])
        squares.append([[(t.double() - e).norm().item() ** 2 for t in (p, o, 2 * e)] for e, p, o in zip(exact, plain, ours)])
        for ours_buffer, buffer in zip(fused.buffers(), network.buffers(), strict=True):
            torch.testing.assert_close(ours_buffer, buffer, rtol=2e-2, atol=2e-2)
    for i, of_seeds in enumerate(zip(*squares)):
        theirs, error, size = (sum(values) ** 0.5 for values in zip(*of_seeds))
        assert error <= 2 * theirs + 1e-6 * size + 1e-9, (i, error, theirs)


def test_other_dtypes_take_the_single_operators():
    network, x = build("discriminator")
    fused = fastgan.fuse(copy.deepcopy(network))
    with torch.autocast("cpu", torch.float16):
        assert "conv_stack" not in kernels_of(lambda: copy.deepcopy(fused)(x))
        assert fused(x).dtype == torch.float16
    torch.testing.assert_close(fused.double()(x.double()), network.double()(x.double()))


def test_empty_batch_works():
    network, x = build("discriminator")
    assert fastgan.fuse(network).eval()(x[:0]).shape == (0, 1, 1, 1)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bn", [False, True])
def test_single_operators_take_the_same_loops_in_channels_last(transposed, bn):
    conv = up(16, 32, True) if transposed else down(16, 32, True)
    network = nn.Sequential(conv, *([nn.BatchNorm2d(32)] if bn else []), nn.LeakyReLU(0.2))
    x = torch.randn(3, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    name = ("conv_transpose2d" if transposed else "conv2d") + ("_bn_act" if bn else "_act")
    operator = getattr(fastgan.ops, name)

    def call(x):
        state = (network[1].weight, network[1].bias) if bn else ()
        return operator(x, conv.weight, conv.bias, *state, stride=2, padding=1, activation="leaky_relu", negative_slope=0.2)

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call(x)
    assert "fastgan::conv_stack_forward" in {event.name for event in profile.events()}
    assert "minimal filtering for" in fastgan.explain(name, x, conv.weight, stride=2, padding=1)
    results = []
    for function in (network, call):
        inputs = x.clone().requires_grad_()
        output = function(inputs)
        gradients = torch.autograd.grad(output.pow(2).sum(), [inputs, *network.parameters()])
        results.append([output, *gradients])
    assert results[0][0].stride() == results[1][0].stride()
    scale = max(g.abs().max().item() for g in results[0])
    for ours, theirs in zip(*reversed(results)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("loop", [
    "conv4x4s2_down", "conv4x4s2_up", "conv4x4s2_down of half lines", "conv4x4s2_up of half lines", "from_pixel", "to_pixel"
])  # fmt: skip
@pytest.mark.parametrize("bn", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_single_operators_take_the_same_loops_in_bfloat16(loop, bn, autocast):
    """With parameters in float32 under autocast, or all in bfloat16: at most twice PyTorch's error against float64."""
    kernel = loop.removesuffix(" of half lines")
    layer, shape = {
        "conv4x4s2_down": (lambda: down(32, 64, True), (32, 8, 8)), "conv4x4s2_up": (lambda: up(64, 32, True), (64, 8, 8)),
        "conv4x4s2_down of half lines": (lambda: down(16, 48, True), (16, 8, 8)),
        "conv4x4s2_up of half lines": (lambda: up(48, 16, True), (48, 8, 8)),
        "from_pixel": (lambda: nn.ConvTranspose2d(24, 64, 4), (24, 1, 1)), "to_pixel": (lambda: nn.Conv2d(32, 2, 4), (32, 4, 4)),
    }[loop]  # fmt: skip
    dtype = torch.float32 if autocast else torch.bfloat16

    def run(function, modules, x):
        inputs = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and x.dtype != torch.float64):
            output = function(inputs)
        weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape)
        return [output, *torch.autograd.grad((output * weights).sum(), [inputs, *modules.parameters()])]

    squares = []  # of the errors of output and gradients, PyTorch's and ours, as in test_autocast_error_is_at_most_twice_pytorchs
    for seed in range(8):
        torch.manual_seed(seed)
        conv = layer()
        network = nn.Sequential(conv, *([nn.BatchNorm2d(conv.out_channels)] if bn else []), nn.LeakyReLU(0.2)).to(dtype)
        x = torch.randn(20, *shape).to(dtype, memory_format=torch.channels_last)
        name = ("conv_transpose2d" if isinstance(conv, nn.ConvTranspose2d) else "conv2d") + ("_bn_act" if bn else "_act")
        arguments = dict(stride=conv.stride, padding=conv.padding, activation="leaky_relu", negative_slope=0.2)

        def ours(x):
            state = (network[1].weight, network[1].bias) if bn else ()
            return getattr(ops, name)(x, conv.weight, conv.bias, *state, **arguments)

        assert (kernel in kernels_of(lambda: run(ours, network, x))) == (kernel == loop or _extension.CPU_ISA != "amx")
        exact = run(doubled := copy.deepcopy(network).double(), doubled, x.double())
        theirs, found = run(network, network, x), run(ours, network, x)
        assert found[0].dtype == torch.bfloat16 and all(t.dtype == dtype for t in found[1:])
        squares.append([[(t.double() - e).norm() ** 2 for t in (a, b, 2 * e)] for e, a, b in zip(exact, theirs, found)])
    for i, of_seeds in enumerate(zip(*squares)):
        theirs, error, size = (sum(values) ** 0.5 for values in zip(*of_seeds))
        if not (bn and i == 3):  # the bias's, which batch norm cancels
            assert error <= 2 * theirs + 1e-6 * size, (i, error, theirs)


@pytest.mark.skipif(not _extension.has_kernels("cpu"), reason="no compiled kernels")
@pytest.mark.parametrize("channels, wants_gradient, own", [(16, False, False), (16, True, True), (32, False, True)])
def test_bfloat16_to_many_pixels_without_gradients(channels, wants_gradient, own):
    """leaves_to_aten() in csrc/ops/conv_stack.cpp, of which explain() knows."""
    x = torch.randn(64, channels, 16, 16).bfloat16().to(memory_format=torch.channels_last)
    weight = torch.randn(32, channels, 4, 4, requires_grad=wants_gradient)
    own = {"avx512_bf16": own, "amx": channels % 32 == 0}.get(_extension.CPU_ISA, True)
    with torch.autocast("cpu", torch.bfloat16):
        assert ("conv4x4s2_down" in kernels_of(lambda: ops.conv2d_act(x, weight, stride=2, padding=1))) == own
        assert ("ATen's" in fastgan.explain("conv2d_act", x, weight, stride=2, padding=1).split("convolution: ")[1][:8]) == (not own)


@pytest.mark.parametrize("name", ["generator", "odd sizes 28 to 7", "other kernels between"])
def test_images_stay_in_channels_last_where_the_trainer_asks_for_it(name, device, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    network, x = build(name, device=device)
    fused = fastgan.fuse(network)
    expected = fused(x)
    with images_in_channels_last():
        found = fused(x)
    assert expected.is_contiguous() and fused(x).is_contiguous()
    if device.type == "cpu":  # on a GPU the networks themselves are in that format
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # cuDNN has an algorithm of its own for each format


def input_gradients(network, x):
    """Of the plain layers and of the operator."""
    gradients = []
    for f in (network, fastgan.fuse(copy.deepcopy(network))):
        leaf = x.clone().requires_grad_()
        f(leaf).sum().backward()
        gradients.append(leaf.grad)
    return gradients


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ["generator", "discriminator", "one pixel without batch norm before it", "batch norm at the end"])
def test_gradients_at_infinity_are_pytorchs_in_eval_mode(name, frozen):
    """The input's gradient does not depend on the values that batch norm normalised, but through the activation."""
    network, x = build(name)
    network.eval().requires_grad_(not frozen)
    x[0, 0, 0, 0] = float("inf")
    theirs, ours = input_gradients(network, x)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * theirs[1:].abs().max().item(), equal_nan=True)


def test_the_derivative_of_relu_at_nan_is_pytorchs():
    torch.manual_seed(0)
    network = nn.Sequential(down(3, 16), nn.ReLU(), down(16, 32), nn.ReLU(), nn.Conv2d(32, 16, 8), nn.ReLU())
    x = torch.randn(4, 3, 32, 32)
    x[1] = float("nan")
    theirs, ours = input_gradients(network, x)
    assert (theirs[1] != 0).any()
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "place, value, message",
    [
        (("parameters", 0), torch.ones(48, 64, 4, 4), "weight of layer 0 must be for 32 input channels"),
        (("parameters", 1), torch.ones(16), r"bias of layer 0 must have shape \[48\], got shape \[16\]"),
        (("parameters", 2), torch.ones(3), r"bn_weight of layer 0 must have shape \[48\]"),
        (("running", 0), torch.ones(47), r"running_mean of layer 0 must have shape \[48\] and be contiguous"),
        (("running", 1), torch.ones(96)[::2], r"running_var of layer 0 must have shape \[48\] and be contiguous"),
        (("running", 3), torch.ones(32).double(), "running_var of layer 1 must be float32, got Double"),
        (("layers", 21), 0, "batch norm of layer 1 must have running statistics, as it does not train"),
        (("layers", 14), 0, r"stride of layer 1 must be at least 1, got \[2, 0\]"),
        (("layers", 3), -1, r"padding of layer 0 must be at least 0, got \[-1, 1\]"),
        (("layers", 23), 5, "the activation in layers must be a number from 0 to 4, got 5"),
        (("layers", slice(24)), [], "layers must have 12 integers and numbers 3 values a layer, got 0 and 6"),
        (("numbers", slice(5, 6)), [0.0, 0.0], "layers must have 12 integers and numbers 3 values a layer, got 24 and 7"),
    ],
)
@pytest.mark.skipif(not _extension.has_kernels("cpu"), reason="needs the compiled kernels")
def test_the_operator_refuses_wrong_arguments_before_it_changes_statistics(place, value, message):
    x = torch.randn(3, 32, 8, 8).contiguous(memory_format=torch.channels_last)
    network = nn.Sequential(down(32, 48, True), nn.BatchNorm2d(48), down(48, 32), nn.BatchNorm2d(32))
    network[3].eval()
    stack = stack_call(network, x)
    given = {name: list(getattr(stack, name)) for name in ("parameters", "running", "layers", "numbers")}
    given[place[0]][place[1]] = value
    before = [t.clone() for t in stack.running]
    with pytest.raises(ValueError, match="conv_stack: " + message):
        torch.ops.fastgan.conv_stack(x, *given.values())
    assert all(map(torch.equal, stack.running, before))


@pytest.mark.skipif(not _extension.has_kernels("cpu"), reason="needs the compiled kernels")
def test_the_operator_refuses_no_layers():
    with pytest.raises(ValueError, match="conv_stack: layers must have 12 integers and numbers 3 values a layer, got 0 and 0"):
        torch.ops.fastgan.conv_stack(torch.ones(1, 2, 8, 8), [], [], [], [])
