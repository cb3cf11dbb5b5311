"""batch_norm_act_noise, and fuse() of the perceptrons that it is for."""

import copy
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

import fastgan
from fastgan import _extension, ops
from fastgan.models import catgan
from fastgan.nn import GaussianNoise, _runs
from fastgan.ops import batch_norm_act_noise
from fastgan.ops.batch_norm_act_noise import batch_norm_act_noise_reference

pytestmark = pytest.mark.skipif(not _extension.has_kernels("cpu"), reason="the compiled extension is missing")

SHAPES = [(2, 1), (3, 5), (100, 10), (257, 64), (300, 130), (4, 3, 7), (2, 5, 9, 9), (5, 70, 3, 3), (1, 3, 20, 30)]


def tensors(shape, dtype=torch.float64, seed=0, affine=True, running=True):
    generator = torch.Generator().manual_seed(seed)

    def random(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    channels = shape[1]
    arguments = {"input": 2 * random(*shape) + 1}
    if affine:
        arguments |= {"bn_weight": 1 + 0.3 * random(channels), "bn_bias": random(channels)}
    if running:
        arguments |= {"running_mean": random(channels), "running_var": random(channels).square() + 0.5}
    return arguments


def results(function, arguments, dtype=None, **options):
    """Output, gradients of input and parameters, and running statistics, all in float64."""
    arguments = {
        name: tensor.detach().clone(memory_format=torch.preserve_format).to(dtype or tensor.dtype)
        for name, tensor in arguments.items()
    }
    leaves = [arguments[name].requires_grad_() for name in ("input", "bn_weight", "bn_bias") if name in arguments]
    output = function(**arguments, **options)
    weights = torch.linspace(-1, 2, output.numel(), dtype=torch.float64).view(output.shape).to(output.dtype)
    gradients = torch.autograd.grad(output, leaves, weights)
    running = [arguments[name] for name in ("running_mean", "running_var") if name in arguments]
    return [tensor.detach().double() for tensor in (output, *gradients, *running)]


def assert_same(found, expected, tolerance):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= tolerance * (1 + theirs.abs().max())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("training", [True, False])
def test_float64_equals_pytorch(shape, activation, training):
    arguments = tensors(shape)
    options = {"activation": activation, "training": training, "momentum": 0.3, "eps": 1e-3}
    found = results(batch_norm_act_noise, arguments, **options)
    assert_same(found, results(batch_norm_act_noise_reference, arguments, **options), 1e-12)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 600), channels=st.integers(1, 200), plane=st.sampled_from([(), (1, 1), (1, 7), (8, 8), (70,)]),
    affine=st.booleans(), running=st.booleans(), channels_last=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape_and_arguments(rows, channels, plane, affine, running, channels_last, seed):
    shape = (rows if len(plane) == 0 else min(rows, 20), channels, *plane)
    assume(torch.Size(shape).numel() > channels)
    arguments = tensors(shape, seed=seed, affine=affine, running=running)
    if channels_last and len(shape) == 4:
        arguments["input"] = arguments["input"].contiguous(memory_format=torch.channels_last)
    found = results(batch_norm_act_noise, arguments)
    assert_same(found, results(batch_norm_act_noise_reference, arguments), 1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_error_is_at_most_twice_pytorchs(dtype):
    for shape in SHAPES[2:]:
        arguments = {name: tensor.to(dtype) for name, tensor in tensors(shape).items()}
        parameters = torch.float32 if dtype != torch.float32 else dtype
        mixed = {name: tensor.to(dtype if name == "input" else parameters) for name, tensor in arguments.items()}
        exact = results(batch_norm_act_noise_reference, mixed, torch.float64)
        ours, theirs = (results(f, mixed) for f in (batch_norm_act_noise, batch_norm_act_noise_reference))
        for a, b, truth in zip(ours, theirs, exact, strict=True):
            limit = 2 * (b - truth).abs().max() + 2 * torch.finfo(dtype).eps * (1 + truth.abs().max())
            assert (a - truth).abs().max() <= limit


def test_statistics_keep_their_digits_far_from_zero():
    """E[x^2] - E[x]^2 in float32 would be off by whole units here."""
    arguments = {"input": torch.randn(300, 7, generator=torch.Generator().manual_seed(0)) + 1e4}
    exact = results(batch_norm_act_noise_reference, arguments, torch.float64)
    ours, theirs = (results(f, arguments) for f in (batch_norm_act_noise, batch_norm_act_noise_reference))
    for a, b, truth in zip(ours, theirs, exact, strict=True):
        assert (a - truth).abs().max() <= 2 * (b - truth).abs().max() + 1e-3


@pytest.mark.parametrize("make", [lambda x: x.t().contiguous().t(), lambda x: x[::2], lambda x: x[:, 3:9]])
def test_strided_input_and_gradient(make):
    x = torch.randn(12, 20)
    strided = make(x).detach().requires_grad_()
    dense = strided.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    for leaf in (strided, dense):
        (2 * batch_norm_act_noise(leaf).t()).sum().backward()
    assert torch.equal(strided.grad, dense.grad)
    assert torch.equal(batch_norm_act_noise(strided), batch_norm_act_noise(dense))


def test_memory_format_is_that_of_the_input():
    x = torch.randn(3, 8, 5, 5)
    assert batch_norm_act_noise(x).is_contiguous()
    assert batch_norm_act_noise(x.contiguous(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 5)], ids=str)
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_gradients_at_nan_and_infinity_are_pytorchs_in_eval_mode(shape, activation):
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 2.0])
    arguments = {
        "input": values.reshape(6, *[1] * (len(shape) - 1)).expand(shape).clone(),
        "running_mean": torch.zeros(3), "running_var": torch.ones(3),
    }  # fmt: skip
    ours, theirs = (
        results(function, arguments, training=False, activation=activation)[1]
        for function in (batch_norm_act_noise, batch_norm_act_noise_reference)
    )
    torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_an_empty_batch():
    x = torch.randn(0, 5, requires_grad=True)
    output = batch_norm_act_noise(x, noise_std=0.5)
    assert output.shape == (0, 5)
    output.sum().backward()
    assert x.grad.shape == (0, 5)


# ---- noise ----


def threefry_normals(seed, chunk):
    """The 64 numbers of a chunk, in float64; Threefry 2x32 with 13 rounds as its paper describes it."""
    rotations, mask = (13, 15, 26, 6, 17, 29, 16, 24), 0xFFFFFFFF
    key = [seed & mask, seed >> 32]
    key.append(0x1BD11BDA ^ key[0] ^ key[1])
    x0 = np.full(32, chunk & mask, np.uint64)
    x1 = (np.arange(32, dtype=np.uint64) + np.uint64((chunk >> 32) * 32)) & mask
    x0, x1 = (x0 + key[0]) & mask, (x1 + key[1]) & mask
    for number in range(13):
        rotation = rotations[number % 8]
        x0 = (x0 + x1) & mask
        x1 = (((x1 << rotation) | (x1 >> (32 - rotation))) & mask) ^ x0
        if number % 4 == 3:
            group = number // 4 + 1
            x0, x1 = (x0 + key[group % 3]) & mask, (x1 + key[(group + 1) % 3] + group) & mask
    return x0, x1


def box_muller(radius_bits, angle_bits):
    radius = np.sqrt(-2 * np.log(((radius_bits >> 8) + 1) * 2.0**-24))
    angle = angle_bits.astype(np.uint32).view(np.int32) * (np.pi / 2**31)
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])


def test_the_tests_own_threefry_gives_the_published_numbers():
    # kat_vectors of the authors' Random123: 13 rounds, counter and key 0.
    x0, x1 = threefry_normals(0, 0)
    assert (int(x0[0]), int(x1[0])) == (0x9D1C5EC6, 0x8BD50731)


@pytest.mark.parametrize("shape, chunks", [((3, 130), 3), ((2, 3, 70), 6)])
def test_noise_is_threefry_and_box_muller_of_the_position(shape, chunks):
    """Rows of 130 channels take three chunks each; planes of 70 elements two, six an image."""
    seed = 0x1234567887654321
    x = torch.zeros(shape)
    found = batch_norm_act_noise(x, activation="identity", noise_std=1.0, seed=torch.tensor(seed)).flatten(1).double()
    rows, width = found.shape
    plane = 70 if len(shape) == 3 else width
    for row in range(rows):
        expected = []
        for first in range(0, width, plane):
            pieces = -(-plane // 64)
            start = row * chunks + first // plane * pieces
            expected.append(np.concatenate([box_muller(*threefry_normals(seed, start + i)) for i in range(pieces)])[:plane])
        np.testing.assert_allclose(found[row].numpy(), np.concatenate(expected), atol=3e-5)


def test_noise_is_standard_normal_and_independent():
    torch.manual_seed(1)
    noise = batch_norm_act_noise(torch.zeros(2000, 200), activation="identity", noise_std=2.0).double() / 2
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 1e-3
    assert abs(stats.kurtosis(noise.flatten().numpy())) < 0.03
    assert noise.abs().max() > 4
    correlations = torch.corrcoef(noise.t())[~torch.eye(200, dtype=bool)]
    assert correlations.abs().max() < 5.5 / 2000**0.5
    between_rows = (noise[1:] * noise[:-1]).mean()
    assert between_rows.abs() < 5 / noise.numel() ** 0.5


def test_noise_is_added_after_the_activation_and_has_no_gradient():
    arguments = tensors((50, 20))
    plain, noisy = (results(batch_norm_act_noise, arguments, noise_std=std) for std in (0.0, 0.5))
    assert abs((noisy[0] - plain[0]).std() - 0.5) < 0.05
    assert_same(noisy[1:], plain[1:], 0)


def test_noise_follows_pytorchs_seed_and_not_the_number_of_threads():
    x, threads = torch.randn(500, 300), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            torch.manual_seed(5)
            found.append([batch_norm_act_noise(x, noise_std=0.3) for _ in range(2)])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
    assert not torch.equal(*found[0])


# ---- derivatives and PyTorch's machinery ----


@pytest.mark.parametrize("shape", [(5, 3), (3, 2, 2, 2)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["leaky_relu", "tanh"])
def test_first_and_second_derivatives(shape, training, activation):
    given = tensors(shape)
    leaves = [given[name].requires_grad_() for name in ("input", "bn_weight", "bn_bias")]
    seed = torch.tensor(3)

    def function(x, weight, bias):
        return batch_norm_act_noise(
            x, weight, bias, given["running_mean"].clone(), given["running_var"].clone(), training=training,
            activation=activation, noise_std=0.4, seed=seed,
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("training", [True, False])
def test_opcheck(training):
    given = tensors((6, 5), torch.float32)
    x = given.pop("input").requires_grad_()
    torch.library.opcheck(
        torch.ops.fastgan.batch_norm_act_noise.default, (x, *given.values(), torch.tensor(7)),
        {"training": training, "noise_std": 0.5},
    )  # fmt: skip


def test_compile_is_the_same_without_a_break():
    given = tensors((6, 5), torch.float32)
    given["input"].requires_grad_()

    def function(x, weight, bias, mean, var):
        return batch_norm_act_noise(x, weight, bias, mean, var, noise_std=0.5, seed=torch.tensor(3)).square().sum()

    expected = function(*(tensor.clone() for tensor in given.values()))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    arguments = [given["input"], *(tensor.clone() for tensor in list(given.values())[1:])]
    found = compiled(*arguments)
    torch.testing.assert_close(found, expected)
    assert not torch.equal(arguments[3], given["running_mean"])
    found.backward()
    assert given["input"].grad.isfinite().all()


def test_autocast_leaves_the_dtype_of_the_input():
    weight, bias = torch.ones(5), torch.zeros(5)
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.bfloat16, torch.float32):
            x = torch.randn(8, 5, dtype=dtype)
            assert batch_norm_act_noise(x, weight, bias, noise_std=0.1).dtype == dtype
            assert batch_norm_act_noise_reference(x, weight, bias, noise_std=0.1).dtype == dtype


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"input": torch.randn(5)}, ValueError, r"input must have shape \[N, C\], .* got \[5\]"),
        ({"input": torch.ones(4, 3, dtype=torch.int64)}, TypeError, "input must have dtype float32, .* got Long"),
        ({"input": torch.randn(1, 3)}, ValueError, "input must give more than one value per channel .* with one"),
        ({"bn_weight": torch.ones(4)}, ValueError, r"bn_weight must have shape \[3\] \(input.size\(1\)\), got \[4\]"),
        ({"bn_bias": torch.ones(3).double()}, TypeError, "bn_bias must have the dtype of input"),
        ({"running_var": None}, ValueError, "running_mean and running_var must be given together"),
        ({"running_mean": None, "running_var": None, "training": False}, ValueError, "running_mean must be given when"),
        ({"eps": -1.0}, ValueError, "eps must be at least 0, got -1"),
        ({"noise_std": -0.5}, ValueError, "noise_std must be at least 0, got -0.5"),
        ({"noise_std": 1.0, "seed": torch.tensor([1])}, ValueError, r"seed must be a scalar, got shape \[1\]"),
        ({"noise_std": 1.0, "seed": torch.tensor(1.0)}, TypeError, "seed must have dtype int64, got Float"),
        ({"activation": "gelu"}, ValueError, "activation must be one of 'relu', .* got 'gelu'"),
    ],
)
def test_errors_name_the_argument_and_change_nothing(change, error, message):
    given = tensors((4, 3), torch.float32)
    before, generator = {name: tensor.clone() for name, tensor in given.items()}, torch.get_rng_state()
    with pytest.raises(error, match="batch_norm_act_noise: " + message):
        batch_norm_act_noise(**({"noise_std": 1.0} | given | change))
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(given[name], before[name]) for name in before)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"activation": "gelu"}, ValueError, "batch_norm_act_noise: activation must be one of 'relu', .* got 'gelu'"),
        ({"negative_slope": "a"}, TypeError, "batch_norm_act_noise: negative_slope must be a number, got str"),
        ({"noise_std": -0.5}, ValueError, "batch_norm_act_noise: noise_std must be at least 0, got -0.5"),
        ({"noise_std": 1.0, "seed": torch.tensor([1, 2])}, ValueError, "only one element tensors"),
    ],
)
def test_the_reference_refuses_before_it_changes_statistics(change, error, message):
    given = tensors((4, 3), torch.float32)
    before = {name: tensor.clone() for name, tensor in given.items()}
    with pytest.raises(error, match=message):
        batch_norm_act_noise_reference(**(given | change))
    assert all(torch.equal(given[name], before[name]) for name in before)


def test_explain_says_which_kernel_runs():
    assert "fused CPU kernels" in fastgan.explain(batch_norm_act_noise, torch.randn(4, 3))


ISA_SCRIPT = """
import torch
from fastgan.ops import batch_norm_act_noise
torch.manual_seed(0)
x = torch.randn(300, 130, requires_grad=True)
y = batch_norm_act_noise(x, noise_std=0.5, seed=torch.tensor(9))
y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape))
print(*(f"{v:.9g}" for v in [*y[::60, ::13].flatten().tolist(), *(1000 * x.grad[::60, ::13]).flatten().tolist()]))
"""


def test_every_instruction_set_agrees():
    outputs = []
    for isa in fastgan.build_info()["cpu_isas_available"]:
        run = subprocess.run(
            [sys.executable, "-c", ISA_SCRIPT], env=os.environ | {"FASTGAN_CPU_ISA": isa}, capture_output=True, text=True,
            check=True,
        )  # fmt: skip
        outputs.append(torch.tensor([float(value) for value in run.stdout.split()]))
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], rtol=1e-4, atol=1e-5)


# ---- fuse ----


def perceptron(noise=0.0):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(12, 30, bias=False), nn.BatchNorm1d(30), nn.LeakyReLU(0.1), GaussianNoise(noise),
        nn.Linear(30, 20), nn.BatchNorm1d(20, momentum=None), nn.ReLU(),
        nn.Linear(20, 8), nn.BatchNorm1d(8, affine=False), GaussianNoise(noise),
        nn.Linear(8, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Tanh(),
    )  # fmt: skip


def count_calls(monkeypatch, fewest=0):
    calls = []
    original = ops.batch_norm_act_noise
    monkeypatch.setattr(_runs, "_FEWEST_NUMBERS", fewest)
    monkeypatch.setattr(ops, "batch_norm_act_noise", lambda *a, **k: (calls.append(k), original(*a, **k))[1])
    return calls


def test_a_fused_perceptron_trains_like_the_plain_one(monkeypatch):
    calls = count_calls(monkeypatch)
    plain = perceptron()
    fused = fastgan.fuse(copy.deepcopy(plain))
    assert list(fused.state_dict()) == list(plain.state_dict())
    optimizers = [torch.optim.SGD(net.parameters(), 0.1) for net in (plain, fused)]
    for step in range(3):
        x = torch.randn(40, 12)
        losses = []
        for net, optimizer in zip((plain, fused), optimizers):
            optimizer.zero_grad()
            losses.append(net(x).square().sum())
            losses[-1].backward()
            optimizer.step()
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    assert len(calls) == 4 * 3
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)
    fused.load_state_dict(plain.state_dict())  # what rounding did to the weights is not to count twice
    torch.testing.assert_close(fused.eval()(x), plain.eval()(x), rtol=1e-4, atol=1e-5)


def test_noise_is_off_in_eval_mode_and_where_its_layer_alone_is(monkeypatch):
    calls = count_calls(monkeypatch)
    fused = fastgan.fuse(perceptron(noise=0.5))
    x = torch.randn(40, 12)
    fused(x)
    assert [call["noise_std"] for call in calls] == [0.5, 0.0, 0.5, 0.0]
    calls.clear()
    fused[3].eval()
    fused(x)
    assert [call["noise_std"] for call in calls] == [0.0, 0.0, 0.5, 0.0]
    fused.eval()
    assert torch.equal(fused(x), fused(x))


def test_what_has_hooks_or_is_a_subclass_stays_as_it_was(monkeypatch):
    class OwnNorm(nn.BatchNorm1d):
        pass

    calls = count_calls(monkeypatch)
    seen = []
    net = nn.Sequential(nn.BatchNorm1d(4), nn.LeakyReLU(), GaussianNoise(0.5), OwnNorm(4), nn.ReLU())
    net[2].register_forward_hook(lambda *a: seen.append(1))
    fastgan.fuse(net)(torch.randn(6, 4))
    assert len(calls) == 1 and calls[0]["noise_std"] == 0.0 and seen == [1]


def test_catgans_networks_run_on_it(monkeypatch):
    calls = count_calls(monkeypatch)
    generator, classifier = (fastgan.fuse(network) for network in catgan(28, 1, 10, 20, "mlp"))
    classifier(generator(torch.randn(6, 20))).sum().backward()
    assert len(calls) == 2 + 5
    assert all(p.grad is not None for p in generator.parameters())


def test_of_few_numbers_pytorchs_batch_norm_is_faster(monkeypatch):
    calls = count_calls(monkeypatch, fewest=_runs._FEWEST_NUMBERS)
    net = nn.Sequential(nn.BatchNorm1d(64), nn.ReLU())
    fused = fastgan.fuse(copy.deepcopy(net))
    for rows, count in ((511, 0), (512, 1)):
        x = torch.randn(rows, 64)
        torch.testing.assert_close(fused(x), net(x))
        assert len(calls) == count
    fastgan.fuse(nn.Sequential(*net, GaussianNoise(0.5)))(torch.randn(20, 64))
    assert len(calls) == 2
    rows = torch.export.Dim("rows", min=2, max=4096)
    for strict in (False, True):
        exported = torch.export.export(fused.eval(), (x[:8],), dynamic_shapes=({0: rows},), strict=strict).module()
        torch.testing.assert_close(exported(x), fused(x))
