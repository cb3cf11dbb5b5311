"""linear_stack: the runs of a perceptron's layers that fuse() executes as one operator."""

import contextlib
import copy
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import fastgan
from fastgan import _extension
from fastgan.models import catgan
from fastgan.nn import GaussianNoise
from fastgan.ops import linear_stack
from fastgan.ops._gradients import gradients_added_in_place
from fastgan.ops.linear_stack import LinearStackCall
from test_batch_norm_act_noise import box_muller, threefry_normals

pytestmark = pytest.mark.skipif(not _extension.has_kernels("cpu"), reason="the compiled extension is missing")


@pytest.fixture(autouse=True)
def small_layers_too(monkeypatch):
    monkeypatch.setattr(linear_stack, "_FEWEST_ROWS", 2)
    monkeypatch.setattr(linear_stack, "_MOST_ROWS", 10_000)
    monkeypatch.setattr(linear_stack, "_WEIGHTS", 0)
    monkeypatch.setattr(linear_stack, "_WEIGHTS_WITH_NORM", 0)


@pytest.fixture
def calls(monkeypatch):
    """How many layers each call of the operator takes."""
    found, run = [], LinearStackCall.run

    def counted(self):
        found.append(len(self.layers) // linear_stack._INTEGERS)
        return run(self)

    monkeypatch.setattr(LinearStackCall, "run", counted)
    return found


def perceptron(noise=0.0, activation=nn.Tanh):
    torch.manual_seed(0)
    return nn.Sequential(
        GaussianNoise(noise),
        nn.Linear(12, 30, bias=False), nn.BatchNorm1d(30), nn.LeakyReLU(0.1), GaussianNoise(noise),
        nn.Linear(30, 70), nn.BatchNorm1d(70, momentum=None), activation(),
        nn.Linear(70, 8), nn.BatchNorm1d(8, affine=False), GaussianNoise(noise),
        nn.Linear(8, 20), activation(),
        nn.Linear(20, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.Sigmoid(),
        nn.Linear(5, 3),
    )  # fmt: skip


def results(net, x, weights=None):
    """Output, gradients of input and parameters, and buffers, in float64."""
    x = x.detach().clone().to(next(net.parameters()).dtype).requires_grad_()
    net.zero_grad()
    output = net(x)
    weights = torch.linspace(-1, 2, output.numel(), dtype=torch.float64).view(output.shape) if weights is None else weights
    output.backward(weights.to(output.dtype))
    tensors = [output, x.grad, *(p.grad for p in net.parameters()), *net.buffers()]
    return [tensor.detach().double().clone() for tensor in tensors]


def errors(found, exact):
    """Largest of each tensor, relative to its largest element."""
    return [((a - truth).abs().max() / truth.abs().max().clamp_min(1.0)).item() for a, truth in zip(found, exact, strict=True)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("rows", [3, 17, 100, 300])  # two would be normalised to 1 and -1: gradients of rounding alone
def test_a_fused_perceptron_is_the_plain_one(training, rows, calls):
    plain = perceptron().train(training)
    fused, exact = fastgan.fuse(copy.deepcopy(plain)), copy.deepcopy(plain).double()
    ours, theirs = [], []
    for _ in range(11):
        x = torch.randn(rows, 12)
        truth = results(exact, x)
        ours.append(errors(results(fused, x), truth))
        theirs.append(errors(results(plain, x), truth))
    for a, b in zip(zip(*ours), zip(*theirs)):
        # Of three rows some are normalised by a small difference, whose rounding is chance: the largest errors say little.
        assert statistics.median(a) <= 3 * max(statistics.median(b), 1e-7)
        assert max(a) <= 1e-3
    assert calls == [6] * 11


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(12, 260), widths=st.lists(st.integers(3, 150), min_size=2, max_size=5), bias=st.booleans(),
    norm=st.booleans(), training=st.booleans(), activation=st.sampled_from([nn.Tanh, nn.Sigmoid, nn.Identity]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_any_widths_and_layers(rows, widths, bias, norm, training, activation, seed):
    torch.manual_seed(seed)
    layers = []
    for inputs, outputs in zip(widths, widths[1:]):
        layers += [nn.Linear(inputs, outputs, bias), *([nn.BatchNorm1d(outputs, eps=0.1)] if norm else []), activation()]
    plain = nn.Sequential(*layers).train(training)
    fused, exact = fastgan.fuse(copy.deepcopy(plain)), copy.deepcopy(plain).double()
    x = torch.randn(rows, widths[0])
    ours, theirs, truth = (results(net, x) for net in (fused, plain, exact))
    # (Behind a single feature batch norm makes gradients zero but for rounding.)
    # Of all tensors together, and no less than the roundings of a sum over rows: a network of a few elements is one that PyTorch
    # may get right to the last digit by luck.
    assert max(errors(ours, truth)) <= 4 * max(*errors(theirs, truth), 6e-8 * rows**0.5)


def test_kinks_of_activations_are_pytorchs():
    """Sums of integers are exact: a derivative that took the other side at 0 would be seen."""
    torch.manual_seed(0)
    for activation in (nn.ReLU(), nn.LeakyReLU(0.25), nn.LeakyReLU(-0.5)):
        plain = nn.Sequential(nn.Linear(20, 40), activation, nn.Linear(40, 6))
        with torch.no_grad():
            for p in plain.parameters():
                p.copy_(torch.randint(-1, 2, p.shape))
        x = torch.randint(-1, 2, (50, 20)).float()
        weights = torch.randint(-3, 4, (50, 6)).double()
        for ours, theirs in zip(results(fastgan.fuse(copy.deepcopy(plain)), x, weights), results(plain, x, weights)):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(0.25)], ids=str)
def test_gradients_at_nan_and_infinity_are_pytorchs_in_eval_mode(activation, value):
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Linear(20, 40), nn.BatchNorm1d(40), activation, nn.Linear(40, 30), activation, nn.Linear(30, 25), nn.BatchNorm1d(25)
    ).eval()
    x = torch.randn(50, 20)
    x[3, 0] = float(value)
    ours, theirs = (results(net, x)[1] for net in (fastgan.fuse(copy.deepcopy(plain)), plain))
    assert theirs[3].isfinite().all()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_without_rows_gradients_are_zero_and_statistics_stay():
    x, seeds, tensors = noise_case()
    leaves = [t.requires_grad_() for t in (x[:0].clone(), *tensors[:4])]
    before = [t.clone() for t in tensors[4:]]
    output = stack_with_noise(leaves[0], seeds, tensors)
    assert output.shape == (0, 9) and all(map(torch.equal, tensors[4:], before))
    for leaf, gradient in zip(leaves, torch.autograd.grad(output.sum(), leaves)):
        assert gradient.shape == leaf.shape and not gradient.any()


def test_training_moves_running_statistics_and_counters_like_pytorch(calls):
    plain = perceptron()
    fused = fastgan.fuse(copy.deepcopy(plain))
    optimizers = [torch.optim.SGD(net.parameters(), 0.1) for net in (plain, fused)]
    for _ in range(3):
        x = torch.randn(40, 12)
        for net, optimizer in zip((plain, fused), optimizers):
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
    assert list(fused.state_dict()) == list(plain.state_dict())
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)
    assert fused[6].num_batches_tracked == 3 and calls == [6] * 3


# ---- noise ----


def stack_with_noise(x, seeds, tensors, training=True):
    """Two layers with noise everywhere, by the operator."""
    w1, w2, gamma, beta, mean, var = tensors
    flags = [0, 1, 1, 1, 1, int(training), 0, 2]
    return torch.ops.fastgan.linear_stack(
        x, [w1, gamma, beta, w2], [mean, var], seeds, [*flags, 0, 0, 0, 0, 0, 0, 0, 3], [0.3, 0.1, 1e-5, 0.2, 0.5, 0.0, 0.0, 0.2, 0.7]
    )  # fmt: skip


def composed_with_noise(x, seeds, tensors, training=True):
    """The same from PyTorch's operators, one seed a layer."""
    w1, w2, gamma, beta, mean, var = tensors

    def noise(z, std, seed):
        """Features in blocks, even in number above one, that begin at multiples of 8; a chunk of 64 normals a row and block."""
        rows, features = z.shape
        blocks, eights = -(-features // 64), -(-features // 8)
        blocks += blocks % 2 if blocks > 1 else 0
        starts = [min(block * eights // blocks * 8, features) for block in range(blocks + 1)]
        drawn = [
            [box_muller(*threefry_normals(int(seed), row * blocks + block))[: starts[block + 1] - starts[block]]
             for block in range(blocks)]
            for row in range(rows)
        ]  # fmt: skip
        return z + std * torch.from_numpy(np.array([np.concatenate(row) for row in drawn])).to(z.dtype)

    z = nn.functional.linear(noise(x, 0.3, seeds[0]), w1)
    z = nn.functional.batch_norm(z, mean, var, gamma, beta, training, 0.1, 1e-5)
    z = noise(nn.functional.leaky_relu(z, 0.2), 0.5, seeds[1])
    return noise(nn.functional.linear(z, w2).tanh(), 0.7, seeds[2])


def noise_case(dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    shapes = [(70, 20), (9, 70), (70,), (70,), (70,)]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    tensors.append(torch.rand(70, generator=generator) + 0.5)
    seeds = torch.randint(2**62, (3,), generator=generator)
    return torch.randn(33, 20, generator=generator).to(dtype), seeds, [t.to(dtype) for t in tensors]


@pytest.mark.parametrize("training", [True, False])
def test_noise_is_threefry_and_box_muller_of_the_position(training):
    x, seeds, tensors = noise_case()
    found = stack_with_noise(x, seeds, [t.clone() for t in tensors], training)
    torch.testing.assert_close(found, composed_with_noise(x, seeds, [t.clone() for t in tensors], training), rtol=1e-3, atol=3e-4)


def test_noise_follows_pytorchs_seed_and_not_the_number_of_threads():
    fused, x, threads = fastgan.fuse(perceptron(noise=0.5)), torch.randn(200, 12), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            torch.manual_seed(5)
            found.append([results(copy.deepcopy(fused), x) for _ in range(2)])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for mine, theirs in zip(found[0], other) for a, b in zip(mine, theirs))
    assert not torch.equal(found[0][0][0], found[0][1][0])


def test_noise_is_off_in_eval_mode_and_where_its_layer_alone_is(calls):
    fused = fastgan.fuse(perceptron(noise=0.5))
    x = torch.randn(40, 12)
    for layer in (fused[0], fused[4], fused[10]):
        layer.eval()
    assert torch.equal(fused(x), fused(x))
    fused[4].train()
    assert not torch.equal(fused(x), fused(x))
    fused.eval()
    assert torch.equal(fused(x), fused(x))
    assert calls == [6] * 6


# ---- derivatives and PyTorch's machinery ----


def derivatives(function, x, seeds, tensors, create_graph):
    leaves = [x.detach().clone().requires_grad_(), *(t.clone().requires_grad_(i < 4) for i, t in enumerate(tensors))]
    output = function(leaves[0], seeds, leaves[1:])
    weights = torch.linspace(-1, 2, output.numel(), dtype=torch.float64).view(output.shape).to(output.dtype)
    first = torch.autograd.grad(output, leaves[:5], weights, create_graph=create_graph)
    if not create_graph:
        return first
    second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves[:5])
    return [*first, *second]


def test_second_derivatives_are_those_of_the_composition():
    case = noise_case()
    ours = derivatives(stack_with_noise, *case, create_graph=True)
    exact = derivatives(composed_with_noise, *noise_case(torch.float64), create_graph=True)
    for a, truth in zip(ours, exact, strict=True):
        assert (a - truth).abs().max() <= 1e-4 * truth.abs().max()
    for a, b in zip(derivatives(stack_with_noise, *case, create_graph=False), ours):
        torch.testing.assert_close(a, b.detach(), rtol=1e-3, atol=1e-4 * b.abs().max().item())


def test_only_what_is_asked_for_is_computed():
    net = fastgan.fuse(perceptron())
    x = torch.randn(30, 12, requires_grad=True)
    everything = results(copy.deepcopy(net), x)
    weights = torch.linspace(-1, 2, 90, dtype=torch.float64).view(30, 3).float()
    (gradient,) = torch.autograd.grad(net(x), x, weights)
    assert torch.equal(gradient.double(), everything[1])
    (last,) = torch.autograd.grad(net(x), net[-1].weight, weights)
    assert torch.equal(last.double(), everything[2 + [name for name, _ in net.named_parameters()].index("16.weight")])
    frozen = copy.deepcopy(net).requires_grad_(False)
    (gradient,) = torch.autograd.grad(frozen(x), x, weights)
    assert torch.equal(gradient.double(), everything[1])
    assert frozen(x.detach()).grad_fn is None


def test_gradients_added_in_place(calls):
    nets = [fastgan.fuse(perceptron()) for _ in range(2)]
    batches = [torch.randn(rows, 12) for rows in (20, 33, 20)]
    for net, context in zip(nets, (contextlib.nullcontext, gradients_added_in_place)):
        for x in batches:
            with context():
                net(x).square().sum().backward()
    for (name, plain), in_place in zip(nets[0].named_parameters(), nets[1].parameters()):
        assert torch.equal(in_place.grad, plain.grad), name
    held = nets[1][1].weight.grad
    version = held._version
    with gradients_added_in_place():
        nets[1](batches[0]).square().sum().backward()
    assert nets[1][1].weight.grad is held and held._version > version


@pytest.mark.parametrize("training", [True, False])
def test_opcheck(training):
    x, seeds, tensors = noise_case()
    x.requires_grad_()
    w1, w2, gamma, beta, mean, var = tensors
    w2.requires_grad_()
    layers = [0, 1, 1, 1, 1, int(training), 1, 2, 1, 0, 0, 0, 0, 0, 0, 0]
    torch.library.opcheck(
        torch.ops.fastgan.linear_stack.default,
        (x, [w1, gamma, beta, w2, torch.randn(9)], [mean, var, torch.tensor(3)], seeds, layers,
         [0.3, 0.1, 1e-5, 0.2, 0.5, 0.0, 0.0, 0.2, 0.7]),
    )  # fmt: skip


def test_compile_is_the_same_without_a_break(calls):
    plain = perceptron()
    plain[6].momentum = 0.1  # of a cumulative average PyTorch itself compiles no whole graph
    fused = fastgan.fuse(plain)
    x = torch.randn(40, 12)
    expected = results(copy.deepcopy(fused), x)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for found, want in zip(results(compiled, x), expected, strict=True):
        torch.testing.assert_close(found, want)
    assert calls[0] == 6
    dynamic = torch.compile(fused.eval(), fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (40, 50, 60):
        x = torch.randn(rows, 12)
        torch.testing.assert_close(dynamic(x), fused(x))


def test_a_network_is_exported_for_any_number_of_rows():
    network = fastgan.fuse(nn.Sequential(nn.Linear(600, 600), nn.ReLU(), nn.Linear(600, 600)).eval())
    rows = torch.export.Dim("rows", min=2, max=4096)
    exported = torch.export.export(network, (torch.randn(64, 600),), dynamic_shapes=({0: rows},)).module()
    for count in (2, 64, 1000):
        x = torch.randn(count, 600)
        torch.testing.assert_close(exported(x), network(x))


def test_export_and_deepcopy_keep_the_network():
    fused = fastgan.fuse(perceptron()).eval()
    x = torch.randn(40, 12)
    exported = torch.export.export(copy.deepcopy(fused), (x,)).module()
    torch.testing.assert_close(exported(x), fused(x))


# ---- where it does not run ----


def test_other_inputs_take_the_layers_one_by_one(calls):
    fused = fastgan.fuse(perceptron()).eval()
    plain = perceptron().eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fused(torch.ones(40, 12)), plain(torch.ones(40, 12)))
    assert calls == []
    torch.testing.assert_close(fused.double()(torch.ones(40, 12).double()), plain.double()(torch.ones(40, 12).double()))
    assert calls == []
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        fastgan.fuse(perceptron())(torch.ones(40, 11))


def test_hooks_subclasses_and_parametrizations_are_honoured(calls):
    class OwnLinear(nn.Linear):
        def forward(self, input):
            return super().forward(input) + 1

    seen = []
    net = nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), OwnLinear(8, 8), nn.ReLU(), spectral_norm(nn.Linear(8, 8)), nn.Linear(8, 4),
    )  # fmt: skip
    net[2].register_forward_hook(lambda *_: seen.append(1))
    plain, fused = copy.deepcopy(net).eval(), fastgan.fuse(net).eval()
    x = torch.randn(20, 6)
    torch.testing.assert_close(fused(x), plain(x))
    assert seen == [1, 1] and calls == [1, 1]


def test_a_batch_norm_used_twice_is_updated_twice(calls):
    torch.manual_seed(0)
    shared = nn.BatchNorm1d(8)
    plain = nn.Sequential(nn.Linear(8, 8), shared, nn.ReLU(), nn.Linear(8, 8), shared)
    fused = fastgan.fuse(copy.deepcopy(plain))
    x = torch.randn(30, 8)
    torch.testing.assert_close(fused(x), plain(x))
    torch.testing.assert_close(fused[1].running_mean, shared.running_mean)
    assert fused[1].num_batches_tracked == 2 and calls == [1, 1]


def test_it_runs_where_it_was_measured_to_be_faster(monkeypatch, calls):
    monkeypatch.undo()
    taken = []
    monkeypatch.setattr(LinearStackCall, "run", lambda self: taken.append(self.features) or torch.zeros(len(self.input), self.features))
    wide = fastgan.fuse(nn.Sequential(nn.Linear(600, 600), nn.ReLU()))
    normed = fastgan.fuse(nn.Sequential(nn.Linear(200, 200), nn.BatchNorm1d(200)))
    for rows in (11, 12, 256, 257):
        wide(torch.zeros(rows, 600))
        normed(torch.zeros(rows, 200))
    fastgan.fuse(nn.Sequential(nn.Linear(200, 200), nn.ReLU()))(torch.zeros(100, 200))
    assert taken == [600, 200, 600, 200]


def test_small_networks_are_not_collected_in_vain(monkeypatch):
    monkeypatch.undo()
    collected = []
    monkeypatch.setattr(LinearStackCall, "add", lambda self, *_: collected.append(1))
    small = fastgan.fuse(nn.Sequential(*[layer for _ in range(6) for layer in (nn.Linear(50, 50), nn.LeakyReLU())]))
    small(torch.zeros(64, 50))
    fastgan.fuse(nn.Sequential(nn.Linear(600, 600), nn.ReLU()))(torch.zeros(300, 600))
    assert collected == []


def test_catgans_networks_run_in_one_call_each(calls):
    generator, classifier = (fastgan.fuse(network) for network in catgan(28, 1, 10, 20, "mlp"))
    images = generator(torch.randn(16, 20))
    logits = classifier(images)
    assert calls == [3, 6]
    logits.sum().backward()
    assert all(p.grad is not None for p in (*generator.parameters(), *classifier.parameters()))
    classifier.eval()
    torch.testing.assert_close(classifier.head(classifier.features(images)), classifier(images))
    seen = []
    classifier.body.register_forward_hook(lambda *_: seen.append(1))
    classifier(images)
    assert seen == [1] and calls[-1] == 5


def test_errors_of_the_operator_change_nothing():
    x, seeds, (w1, w2, gamma, beta, mean, var) = noise_case()
    flags, before = [0, 1, 1, 1, 1, 1, 0, 2], mean.clone()
    run = torch.ops.fastgan.linear_stack
    with pytest.raises(ValueError, match="layers must have 8 integers and numbers 1 \\+ 4 values a layer, got 7 and 5"):
        run(x, [w1, gamma, beta], [mean, var], seeds, flags[1:], [0.0] * 5)
    with pytest.raises(ValueError, match="parameters has 2 tensors, too few"):
        run(x, [w1, gamma], [mean, var], seeds, flags, [0.0] * 5)
    with pytest.raises(ValueError, match=r"weight of layer 0 must have shape \[\*, 20\], got \[9, 70\]"):
        run(x, [w2, gamma, beta], [mean, var], seeds, flags, [0.0] * 5)
    with pytest.raises(ValueError, match=r"parameter 1 must have shape \[70\], got \[9\]"):
        run(x, [w1, gamma[:9], beta], [mean, var], seeds, flags, [0.0] * 5)
    with pytest.raises(ValueError, match="batch norm of layer 0 must have running statistics"):
        run(x, [w1, gamma, beta], [], seeds, [0, 1, 1, 1, 0, 0, 0, 2], [0.0] * 5)
    for running in ([mean], [mean, var.double()]):
        with pytest.raises(ValueError, match="running must have at 1 a contiguous tensor of 70 values of Float"):
            run(x, [w1, gamma, beta], running, seeds, flags, [0.0] * 5)
    with pytest.raises(ValueError, match="running must have at 2 a contiguous tensor of 1 values of Long"):
        run(x, [w1, gamma, beta], [mean, var, torch.zeros(1)], seeds, [0, 1, 1, 1, 1, 1, 1, 2], [0.0] * 5)
    with pytest.raises(ValueError, match=r"input must have more than one row, as batch norm of layer 0 trains, got shape \[1, 20\]"):
        run(x[:1], [w1, gamma, beta], [mean, var], seeds, flags, [0.0] * 5)
    with pytest.raises(ValueError, match="linear_stack: the activation in layers must be a number from 0 to 4, got -1"):
        run(x, [w1, gamma, beta], [mean, var], seeds, [*flags[:7], -1], [0.0] * 5)
    with pytest.raises(ValueError, match=r"seeds must have shape \[2\], got \[3\]"):
        run(x, [w1, gamma, beta], [mean, var], seeds, flags, [0.1] * 5)
    with pytest.raises(ValueError, match=r"input must have shape \[N, C\], got \[33, 20, 1\]"):
        run(x[:, :, None], [w1, gamma, beta], [mean, var], seeds, flags, [0.0] * 5)
    assert torch.equal(mean, before)
