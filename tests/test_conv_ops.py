"""The four operators of the convolution family against plain PyTorch: conv2d_bn_act, conv_transpose2d_bn_act,
conv2d_act, conv_transpose2d_act."""

import os
import subprocess
import sys
import warnings

import numpy
import pytest
import torch
import torch.nn.functional as F
from conv_cases import OPS, TENSORS, dcgan_case, lay_out, random_case
from hypothesis import given, settings
from hypothesis import strategies as st

import fastgan
from fastgan import _extension, ops
from fastgan.ops._conv import pair

RANDOM_CASES = 600
CHUNK = 50

DCGAN_CASES = [
    dcgan_case("conv2d_bn_act", 16, 32, 8),
    dcgan_case("conv2d_act", 3, 16, 16),
    dcgan_case("conv2d_act", 32, 1, 4, stride=1, padding=0, activation="identity"),
    dcgan_case("conv_transpose2d_bn_act", 10, 32, 1, batch=4, stride=1, padding=0),
    dcgan_case("conv_transpose2d_bn_act", 32, 16, 4),
    dcgan_case("conv_transpose2d_act", 16, 3, 8, activation="tanh"),
]


def errors(case, function, dtype, device):
    """Largest absolute error of output, gradients and running statistics against float64 PyTorch."""
    reference = OPS[case.op][1]
    exact = case.run(reference, torch.float64)
    found = case.run(function, dtype, device)
    pairs = [("output", exact[0], found[0])]
    pairs += [(f"gradient of {name}", exact[1][name], found[1][name]) for name in exact[1]]
    pairs += [(name, exact[2][name], found[2][name]) for name in exact[2]]
    return {
        name: ((a - b.cpu().double()).abs().max().item() if a.numel() else 0.0, a.abs().max().item() if a.numel() else 0.0)
        for name, a, b in pairs
    }


@pytest.mark.parametrize("first", range(0, RANDOM_CASES, CHUNK))
def test_float64_equals_pytorch_for_any_arguments(first, device):
    for seed in range(first, first + CHUNK):
        case = random_case(seed)
        for name, (error, size) in errors(case, OPS[case.op][0], torch.float64, device).items():
            assert error <= 1e-10 * (1 + size), (seed, name, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first", [0, 1000, 2000])
def test_low_precision_error_is_at_most_twice_pytorchs(dtype, first, device):
    function_error, torch_error = {}, {}
    for seed in range(first, first + 25):
        case = random_case(seed)
        case.grad_layout = "contiguous"
        for sums, function in ((function_error, OPS[case.op][0]), (torch_error, OPS[case.op][1])):
            for name, (error, size) in errors(case, function, dtype, device).items():
                sums.setdefault(name, []).append(error / (1 + size))
    # PyTorch returns rounding noise for the gradient of a bias that batch norm cancels, fastgan exact zeros.
    for name, theirs in torch_error.items():
        ours = function_error[name]
        floor = 2 * torch.finfo(dtype).eps
        assert sum(ours) <= 2 * sum(theirs) + floor, name
        assert max(ours) <= 2 * max(theirs) + 2 * floor, name


@pytest.mark.parametrize("case", DCGAN_CASES, ids=lambda case: f"{case.op}-{case.weight_shape}")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_memory_format_of_output_and_gradient_follow_pytorch(case, layout, device):
    case.layout = case.grad_layout = layout
    function, reference = OPS[case.op]
    ours, theirs = case.run(function, torch.float32, device), case.run(reference, torch.float32, device)
    assert ours[0].stride() == theirs[0].stride()
    for name in theirs[1]:
        assert ours[1][name].shape == theirs[1][name].shape


@pytest.mark.skipif(not _extension.has_kernels("cpu"), reason="no compiled kernels")
@pytest.mark.parametrize("case, loop", [
    (dcgan_case("conv_transpose2d_bn_act", 10, 32, 1, batch=4, stride=1, padding=0), "from_pixel"),
    (dcgan_case("conv_transpose2d_act", 100, 64, 1, batch=9, stride=3, padding=0, activation="tanh"), "from_pixel"),
    (dcgan_case("conv2d_act", 48, 1, 4, batch=9, stride=1, padding=0, activation="identity"), "to_pixel"),
    (dcgan_case("conv2d_act", 16, 4, 4, batch=3, stride=2, padding=0, activation="sigmoid"), "to_pixel"),
    (dcgan_case("conv2d_bn_act", 32, 3, 4, batch=70, stride=1, padding=0), "to_pixel"),
], ids=lambda value: value if isinstance(value, str) else f"{value.op}-{value.weight_shape}")  # fmt: skip
def test_layers_from_and_to_one_pixel_run_on_loops_of_their_own(case, loop):
    case.layout = "channels_last"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        found = errors(case, OPS[case.op][0], torch.float32, "cpu")
    assert f"fastgan::{loop}" in {event.name for event in profile.events()}
    for name, (theirs, size) in errors(case, OPS[case.op][1], torch.float32, "cpu").items():
        assert found[name][0] <= 4 * theirs + 1e-6 * size, (name, found[name], theirs)
    assert "fastgan's for images " in fastgan.explain(case.op, **case.make(torch.float32)[0], **case.options)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_first_and_second_derivatives_by_finite_differences(op, training, activation, device):
    case = dcgan_case(op, 2, 2, 4, batch=2, activation=activation)
    if op.endswith("bn_act"):
        case.options["training"] = training
        case.affine = activation != "identity"
    elif not training:
        case.options["negative_slope"] = -0.5  # the composed route of leaky_relu
    tensors, running = case.make(torch.float64, device)
    names = list(tensors)

    def function(*values):
        fresh = {name: value.clone() for name, value in running.items()}
        return OPS[op][0](**dict(zip(names, values)), **fresh, **case.options)

    assert torch.autograd.gradcheck(function, tuple(tensors.values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tuple(tensors.values()), fast_mode=True, atol=1e-4)


@pytest.mark.parametrize("op", ["conv2d_bn_act", "conv_transpose2d_bn_act"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["leaky_relu", "sigmoid", "identity"])
@pytest.mark.parametrize("channels_last", ["weight", "gradient"])
def test_derivative_of_a_reference_at_one_image_by_finite_differences(op, training, activation, channels_last):
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 4, 6, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(2, 2, 4, 4, dtype=torch.float64, generator=generator)
    if channels_last == "weight":
        weight = weight.to(memory_format=torch.channels_last)

    def function(image):
        mean, var = image.new_zeros(2), image.new_ones(2)
        options = dict(stride=2, padding=1, training=training, activation=activation)
        output = OPS[op][1](image, weight, None, None, None, mean, var, **options)
        return output.permute(1, 2, 0).contiguous() if channels_last == "gradient" else output

    assert torch.autograd.gradcheck(function, image, fast_mode=True)


def batch_norm_by_formula(y, running_mean, running_var, weight, bias, training, momentum, eps):
    """F.batch_norm has no third derivative in PyTorch 2.15."""
    variance, mean = torch.var_mean(y, (0, 2, 3), correction=0, keepdim=True)
    return (y - mean) / torch.sqrt(variance + eps) * weight[:, None, None] + bias[:, None, None]


@pytest.mark.parametrize("op", OPS)
def test_gradient_penalty_and_third_derivative_equal_pytorchs(op, device, monkeypatch):
    monkeypatch.setattr(F, "batch_norm", batch_norm_by_formula)
    case = dcgan_case(op, 2, 3, 5, activation="tanh")
    results = []
    for function in OPS[op]:
        tensors, running = case.make(torch.float64, device)
        x = tensors["input"]
        derivative = function(**tensors, **running, **case.options).pow(3).sum()
        chain = []
        for _ in range(3):
            (derivative_x,) = torch.autograd.grad(derivative, x, create_graph=True)
            derivative = derivative_x.pow(2).sum()
            chain.append(derivative_x)
        results.append([*chain, *torch.autograd.grad(derivative, list(tensors.values()))])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(op, layout, device):
    case = dcgan_case(op, 3, 4, 6)
    case.layout = layout
    tensors, running = case.make(torch.float32, device)
    arguments = [tensors.get(name) for name in TENSORS[: 5 if op.endswith("bn_act") else 3]]
    options = case.options | {name: pair(case.options[name]) for name in ("stride", "padding")}
    torch.library.opcheck(getattr(torch.ops.fastgan, op), (*arguments, *running.values()), options)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_breaks(op, dynamic, device):
    torch._dynamo.reset()
    function = OPS[op][0]
    compiled = torch.compile(lambda **kwargs: function(**kwargs), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (2, 3):
        case = dcgan_case(op, 3, 4, 6, batch=batch)
        plain, traced = case.run(function, torch.float32, device), case.run(compiled, torch.float32, device)
        torch.testing.assert_close(traced, plain, rtol=1e-5, atol=1e-5)


def test_compile_with_the_default_backend():
    torch._dynamo.reset()
    case = dcgan_case("conv2d_bn_act", 3, 4, 6)
    compiled = torch.compile(lambda **kwargs: ops.conv2d_bn_act(**kwargs) * 2, fullgraph=True)
    plain = case.run(lambda **kwargs: ops.conv2d_bn_act(**kwargs) * 2, torch.float32)
    torch.testing.assert_close(case.run(compiled, torch.float32), plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", ["conv2d_act", "conv2d_bn_act"])
def test_compile_with_the_default_backend_where_image_and_weight_differ_in_format(op):
    torch._dynamo.reset()  # inductor asserts the strides that the fake kernels of backward promise
    gradients = []
    for function in (OPS[op][0], torch.compile(OPS[op][0], fullgraph=True)):
        x = torch.linspace(-1, 1, 4 * 3 * 64).reshape(4, 3, 8, 8).sin().to(memory_format=torch.channels_last).requires_grad_()
        w = torch.linspace(-1, 1, 16 * 27).reshape(16, 3, 3, 3).cos().requires_grad_()
        function(x, w, padding=1).pow(3).sum().backward()
        gradients.append((x.grad, w.grad))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("op", OPS)
def test_empty_batch_gives_empty_output_zero_gradients_and_no_update(op, device):
    case = dcgan_case(op, 3, 4, 6, batch=0)
    output, gradients, running = case.run(OPS[op][0], torch.float32, device)
    assert output.shape == (0, 4, *((3, 3) if "transpose" not in op else (12, 12)))
    assert all((gradient == 0).all() for gradient in gradients.values())
    before = case.make(torch.float32, device)[1]
    assert all(torch.equal(running[name], before[name]) for name in running)


def test_integers_of_numpy_are_integers():
    x, w, two = torch.randn(2, 3, 7, 6), torch.randn(4, 3, 3, 3), numpy.int64(2)
    y = ops.conv2d_act(x, w, stride=two, padding=(two, 1), dilation=two)
    torch.testing.assert_close(y, ops.conv2d_act(x, w, stride=2, padding=(2, 1), dilation=2))


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("kernel", [3, 4])
def test_padding_by_name_equals_conv2d(padding, kernel, device):
    x, w = torch.randn(2, 3, 7, 6, device=device), torch.randn(4, 3, kernel, kernel, device=device)
    for op in ("conv2d_act", "conv2d_bn_act"):
        function, reference = OPS[op]
        torch.testing.assert_close(function(x, w, padding=padding), reference(x, w, padding=padding), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", OPS)
def test_autocast_casts_what_pytorch_casts(op, device):
    case = dcgan_case(op, 3, 8, 8, batch=4)
    results = []
    for function in OPS[op]:
        tensors, running = case.make(torch.float32, device)
        with torch.autocast(device.type, torch.bfloat16):
            output = function(**tensors, **running, **case.options)
        gradients = torch.autograd.grad(output.float().pow(2).sum(), list(tensors.values()))
        results.append((output, gradients, running))
    (ours, our_gradients, our_running), (theirs, their_gradients, their_running) = results
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=3e-2, atol=3e-2)
    for name, a, b in zip(case.make()[0], our_gradients, their_gradients):
        assert a.dtype == b.dtype == torch.float32
        if name != "bias" or not op.endswith("bn_act"):
            torch.testing.assert_close(a, b, rtol=5e-2, atol=5e-2 * b.abs().max().item())
    torch.testing.assert_close(our_running, their_running, rtol=2e-2, atol=2e-2)


def test_batch_norm_parameters_may_stay_float32_beside_bfloat16_input(device):
    x, w = torch.randn(2, 3, 8, 8, device=device).bfloat16(), torch.randn(4, 3, 4, 4, device=device).bfloat16()
    mean, var, gamma = torch.zeros(4, device=device), torch.ones(4, device=device), torch.ones(4, device=device)
    output = ops.conv2d_bn_act(x, w, None, gamma, None, mean, var)
    assert output.dtype == torch.bfloat16 and mean.dtype == torch.float32 and mean.abs().sum() > 0


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("op", OPS)
def test_arrays_may_have_any_strides(op, layout, device):
    if device.type == "cuda":
        pytest.skip("float32 main loops are cuDNN's")
    tensors, _ = dcgan_case(op, 16, 32, 8).make(torch.float32, device)
    tensors["input"] = lay_out(tensors["input"].detach(), layout)
    arrays = {name: tensors[name] for name in tensors if name not in ("input", "weight")}
    for strided in (lambda t: torch.stack([t, t + 1], 1)[:, 0], lambda t: t.mean().expand(len(t))):
        given = {name: strided(array.detach()).requires_grad_() for name, array in arrays.items()}
        assert not any(t.is_contiguous() for t in given.values())
        results = []  # PyTorch's own batch norm leaves a gradient unset where arrays have strides of 0: it gets dense ones
        for function, arrays in zip(OPS[op], (given, {name: array.contiguous() for name, array in given.items()})):
            output = function(**tensors | arrays, stride=2, padding=1, activation="tanh")
            results.append([output, *torch.autograd.grad(output.pow(2).sum(), list(arrays.values()))])
        for ours, theirs in zip(*results):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("shape", [(1, 3, 1024, 1024), (2, 2, 700, 513), (3, 1, 129, 129)], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_statistics_of_large_images_are_as_exact_as_of_small_ones(shape, layout):
    torch.manual_seed(0)
    x, channels = torch.randn(shape).add(3).contiguous(memory_format=layout), shape[1]
    mean, var = torch.zeros(channels), torch.zeros(channels)
    gamma, beta = torch.ones(channels, requires_grad=True), torch.zeros(channels, requires_grad=True)
    y = ops.conv2d_bn_act(x, torch.eye(channels)[:, :, None, None], None, gamma, beta, mean, var, momentum=1.0, activation="identity")
    upstream = torch.rand(shape)
    y.backward(upstream)
    exact = x.double()
    torch.testing.assert_close(mean.double(), exact.mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), exact.var((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(beta.grad.double(), upstream.double().sum((0, 2, 3)), rtol=1e-6, atol=0)


def test_large_mean_does_not_spoil_the_variance(device):
    # E[x^2] - E[x]^2 in float32 would be off by 100% here.
    x = (torch.randn(8, 1, 16, 16) + 3000).to(device)
    w = torch.ones(1, 1, 1, 1, device=device)
    for layout in ("contiguous", "channels_last"):
        mean, var = torch.zeros(1, device=device), torch.ones(1, device=device)
        ops.conv2d_bn_act(lay_out(x, layout), w, None, None, None, mean, var, momentum=1.0)
        torch.testing.assert_close(var, x.double().var().float().reshape(1), rtol=1e-3, atol=0)


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_nan_and_infinity_go_through_as_in_pytorch(activation, device):
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 200.0, -200.0, 1e-30], device=device)
    x = x.reshape(1, 1, 2, 4)
    w = torch.ones(1, 1, 1, 1, device=device)
    function, reference = OPS["conv2d_act"]
    torch.testing.assert_close(
        function(x, w, activation=activation), reference(x, w, activation=activation), equal_nan=True
    )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [1, 200])
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_gradients_at_nan_and_infinity_are_pytorchs_in_eval_mode(activation, channels, layout):
    """The input's gradient does not depend on the values that batch norm normalised, but through the activation."""
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 2.0])
    x, w = lay_out(values.view(6, 1, 1, 1).repeat(1, channels, 1, 2), layout), torch.ones(channels, 1, 1, 1)
    gradients = []
    for function in OPS["conv2d_bn_act"]:
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        function(
            leaf, w, None, None, None, torch.zeros(channels), torch.ones(channels), groups=channels, training=False, activation=activation
        ).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, equal_nan=True)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "tanh", "sigmoid", "identity"])
@pytest.mark.parametrize("op", ["conv2d_act", "conv_transpose2d_act"])
def test_nan_goes_through_the_filtering_loops(op, activation):
    x = torch.full((2, 16, 8, 8), float("nan")).to(memory_format=torch.channels_last)
    w = torch.randn(16, 16, 4, 4)
    assert OPS[op][0](x, w, stride=2, padding=1, activation=activation).isnan().all()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("op", ["conv2d_act", "conv_transpose2d_act", "conv2d_bn_act", "conv_transpose2d_bn_act"])
def test_an_output_whose_values_backward_does_not_read_may_be_changed_in_place(op, layout, device):
    activation = "leaky_relu" if "bn" in op else "identity"
    x = torch.randn(2, 16, 8, 8, device=device).to(memory_format=layout)
    gradients = []
    for function in OPS[op]:
        w = torch.linspace(-1, 1, 16 * 16 * 16, device=device).reshape(16, 16, 4, 4).sin().requires_grad_()
        y = function(x, w, stride=2, padding=1, activation=activation)
        y *= 2
        y.pow(2).sum().backward()
        gradients.append(w.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


def test_one_pixel_in_channels_last_gives_channels_last():
    z, w = torch.randn(4, 100, 1, 1).to(memory_format=torch.channels_last), torch.randn(100, 64, 4, 4)
    assert ops.conv_transpose2d_act(z, w).stride() == torch.nn.functional.conv_transpose2d(z, w).stride()


def test_running_statistics_that_require_a_gradient_are_refused():
    mean, var = torch.zeros(4, requires_grad=True), torch.ones(4)
    x, w = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
    with pytest.raises(ValueError, match="conv2d_bn_act: running_mean must not require a gradient"):
        ops.conv2d_bn_act(x, w, None, None, None, mean, var, training=False)
    with torch.no_grad():
        ops.conv2d_bn_act(x, w, None, None, None, mean, var, training=False)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_runs_are_bit_identical_and_threads_change_nothing_beyond_rounding(op, layout):
    case = dcgan_case(op, 16, 32, 16, batch=8)
    case.layout = layout
    threads = torch.get_num_threads()
    try:
        first, again = (case.run(OPS[op][0], torch.float32) for _ in range(2))
        torch.set_num_threads(1)
        single = case.run(OPS[op][0], torch.float32)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    torch.testing.assert_close(single, first, rtol=1e-4, atol=1e-4)


# Names of values that a call must refuse, and what the message must say.
BAD_CALLS = {
    "integer input": (dict(input=torch.ones(2, 3, 8, 8, dtype=torch.long)), "input must have dtype float32"),
    "weight dtype": (dict(weight=torch.ones(4, 3, 4, 4, dtype=torch.double)), "weight must have the dtype of input"),
    "bias dtype": (dict(bias=torch.ones(4).double()), "bias must have the dtype of input"),
    "no weight": (dict(weight=None), "weight must be a tensor, got None"),
    "weight device": (dict(weight=torch.ones(4, 3, 4, 4, device="meta")), "weight must be on the device of input"),
    "running_mean device": (dict(running_mean=torch.ones(4, device="meta")), "running_mean must be on the device"),
    "input dims": (dict(input=torch.ones(3, 8)), r"input must have shape \[N, C, H, W\] or \[C, H, W\], got \[3, 8\]"),
    "input channels": (dict(input=torch.ones(2, 5, 8, 8)), "input must have 3 channels .*got 5"),
    "weight dims": (dict(weight=torch.ones(4, 3, 4)), r"weight must have shape .*got \[4, 3, 4\]"),
    "bias shape": (dict(bias=torch.ones(3)), r"bias must have shape \[4\] \(weight.size\(.*got \[3\]"),
    "bn_weight shape": (dict(bn_weight=torch.ones(2)), r"bn_weight must have shape \[4\] \(weight.size\(.*got \[2\]"),
    "bn_bias shape": (dict(bn_bias=torch.ones(4, 1)), r"bn_bias must have shape \[4\].*got \[4, 1\]"),
    "running_var shape": (dict(running_var=torch.ones(5)), r"running_var must have shape \[4\].*got \[5\]"),
    "one running statistic": (dict(running_var=None), "running_mean and running_var must be given together"),
    "no running statistics": (
        dict(running_mean=None, running_var=None, training=False), "running_mean must be given when training=False"),
    "stride": (dict(stride=0), "stride must be one or two integers of at least 1"),
    "padding": (dict(padding=-1), "padding must be one or two integers of at least 0"),
    "dilation": (dict(dilation=0), "dilation must be one or two integers of at least 1"),
    "groups": (dict(groups=0), "groups must be at least 1"),
    "indivisible groups": (dict(groups=3), "groups"),
    "too small": (dict(input=torch.ones(2, 3, 2, 2), dilation=3, padding=0), "too small for weight"),
    "activation": (dict(activation="gelu"), "activation must be one of 'relu'.*got 'gelu'"),
    "one value per channel": (
        dict(input=torch.ones(1, 3, 4, 4), padding=0), "more than one value per channel when training=True"),
    "eps": (dict(eps=-1.0), "eps must be at least 0"),
    "momentum": (dict(momentum=float("nan")), "momentum must be a number"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_call_names_the_argument_and_changes_nothing(name):
    change, message = BAD_CALLS[name]
    arguments = dict(
        input=torch.randn(2, 3, 8, 8), weight=torch.randn(4, 3, 4, 4), running_mean=torch.zeros(4),
        running_var=torch.ones(4), stride=2, padding=1,
    )  # fmt: skip
    before = {key: arguments[key].clone() for key in ("running_mean", "running_var")}
    originals = {key: arguments[key] for key in before}
    with pytest.raises((ValueError, TypeError, RuntimeError), match=f"conv2d_bn_act: .*{message}"):
        ops.conv2d_bn_act(**{**arguments, **change})
    assert all(torch.equal(originals[key], before[key]) for key in before)


@pytest.mark.parametrize("op", ["conv2d_bn_act", "conv_transpose2d_bn_act"])
@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"activation": "gelu"}, ValueError, "activation must be one of 'relu'.*got 'gelu'"),
        ({"activation": "leaky_relu", "negative_slope": "a"}, TypeError, "negative_slope must be a number, got str"),
    ],
)
def test_a_reference_refuses_a_wrong_activation_before_it_changes_statistics(op, change, error, message):
    mean, var = torch.zeros(4), torch.ones(4)
    with pytest.raises(error, match=f"{op}: {message}"):
        OPS[op][1](torch.randn(2, 4, 8, 8), torch.randn(4, 4, 3, 3), None, None, None, mean, var, **change)
    assert mean.eq(0).all() and var.eq(1).all()


def test_bad_output_padding_is_refused():
    with pytest.raises(ValueError, match="conv_transpose2d_act: output_padding must be smaller than stride or dilation"):
        ops.conv_transpose2d_act(torch.ones(1, 2, 4, 4), torch.ones(2, 3, 4, 4), stride=2, output_padding=2)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3), c_in=st.integers(1, 5), c_out=st.integers(1, 9), height=st.integers(1, 9),
    width=st.integers(1, 9), kernel=st.integers(1, 4), stride=st.integers(1, 3), padding=st.integers(0, 3),
    op=st.sampled_from(sorted(OPS)), channels_last=st.booleans(),
)  # fmt: skip
def test_accepts_and_refuses_the_shapes_pytorch_does(
    batch, c_in, c_out, height, width, kernel, stride, padding, op, channels_last
):
    transposed = "transpose" in op
    x = lay_out(torch.randn(batch, c_in, height, width), "channels_last" if channels_last else "contiguous")
    w = torch.randn(c_in, c_out, kernel, kernel) if transposed else torch.randn(c_out, c_in, kernel, kernel)
    function, reference = OPS[op]
    try:
        expected = reference(x, w, stride=stride, padding=padding)
    except (RuntimeError, ValueError):
        with pytest.raises((RuntimeError, ValueError), match=f"{op}: "):
            function(x, w, stride=stride, padding=padding)
        return
    torch.testing.assert_close(function(x, w, stride=stride, padding=padding), expected, rtol=1e-3, atol=1e-3)


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env={**os.environ, **environment}, text=True, capture_output=True
    )


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512_bf16", "amx"])
def test_every_instruction_set_gives_the_same_results(isa):
    if isa not in fastgan.build_info()["cpu_isas_available"]:
        pytest.skip(f"this machine has no {isa}")
    code = f"""
import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})
import torch, fastgan
from conv_cases import OPS, dcgan_case, random_case
assert fastgan.build_info()["cpu_isa"] == {isa!r}
cases = [random_case(seed) for seed in range(5000, 5030)]
cases += [dcgan_case("conv2d_bn_act", 19, 37, 9), dcgan_case("conv_transpose2d_act", 16, 3, 8, activation="tanh")]
for case in cases:
    for dtype, bound in ((torch.float32, 2e-4), (torch.bfloat16, 6e-2)):
        ours, exact = case.run(OPS[case.op][0], dtype), case.run(OPS[case.op][1], torch.float64)
        scale = max(1.0, exact[0].abs().max().item())
        assert (ours[0].double() - exact[0]).abs().max().item() <= bound * scale, (case, dtype)
"""
    result = run_python(code, FASTGAN_CPU_ISA=isa)
    assert result.returncode == 0, result.stderr


def test_unknown_instruction_set_is_an_error_that_lists_the_known():
    result = run_python("import fastgan; fastgan.build_info()", FASTGAN_CPU_ISA="sse9")
    assert "FASTGAN_CPU_ISA must be one of baseline, avx2" in result.stderr


def test_survives_the_shape_on_which_pytorchs_own_backward_corrupts_the_heap():
    code = """
import torch, fastgan
for _ in range(20):
    x = torch.randn(2, 8, 5, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    for memory_format in (torch.contiguous_format, torch.channels_last):
        w = torch.randn(8, 8, 1, 1).to(memory_format=memory_format).requires_grad_()
        for op in (fastgan.ops.conv_transpose2d_act, fastgan.ops.conv_transpose2d_bn_act):
            op(x, w, stride=2, output_padding=1).pow(2).sum().backward()
            y = op(x, w, stride=2, output_padding=1, activation="leaky_relu", negative_slope=-0.3)
            g = torch.autograd.grad(y.pow(2).sum(), (x, w), create_graph=True)
            sum(each.pow(2).sum() for each in g).backward()
"""
    result = run_python(code, MALLOC_CHECK_="3", MALLOC_PERTURB_="165")
    assert result.returncode == 0, result.stderr


def test_low_precision_weight_gradient_of_taps_that_meet_only_padding_is_zero():
    # PyTorch 2.13 leaves it unset; freshly allocated memory is filled with huge numbers here.
    code = """
import torch, fastgan
x = torch.ones(3, 1, 1, 1, dtype=torch.bfloat16)
w = torch.ones(3, 1, 4, 4, dtype=torch.bfloat16, requires_grad=True)
met = torch.zeros(4, 4, dtype=torch.bool)
met[2, 1::2] = True
for slope in (0.2, -0.3):
    for create_graph in (False, True):
        for _ in range(20):
            y = fastgan.ops.conv2d_act(x, w, stride=(3, 2), padding=(2, 3), negative_slope=slope)
            (g,) = torch.autograd.grad(y.sum(), w, create_graph=create_graph)
            assert (g[..., ~met] == 0).all() and (g[..., met] == 3).all(), g
"""
    result = run_python(code, MALLOC_PERTURB_="128")
    assert result.returncode == 0, result.stderr


def test_plain_pytorch_runs_with_one_warning_where_there_are_no_kernels(monkeypatch):
    monkeypatch.setattr(_extension, "_DEVICES", frozenset())
    monkeypatch.setattr(_extension, "_C", None)
    monkeypatch.setattr(_extension, "_missing_reason", "it was taken away for this test")
    monkeypatch.setattr(_extension, "_warned", set())
    case = dcgan_case("conv2d_bn_act", 3, 4, 6)
    with pytest.warns(RuntimeWarning, match="plain PyTorch: it was taken away"):
        torch.testing.assert_close(case.run(OPS[case.op][0]), case.run(OPS[case.op][1]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        case.run(OPS[case.op][0])
    monkeypatch.setenv("FASTGAN_STRICT", "1")
    with pytest.raises(RuntimeError, match="conv2d_bn_act: FASTGAN_STRICT=1 .* it was taken away"):
        case.run(OPS[case.op][0])


def test_build_against_another_pytorch_is_one_clear_import_error():
    code = """
import fastgan._build_config as config
config.TORCH_VERSION = "1.99.0"
import sys
for name in [name for name in sys.modules if name.startswith("fastgan") and name != "fastgan._build_config"]:
    del sys.modules[name]
import fastgan
"""
    result = run_python(code)
    assert "ImportError: fastgan" in result.stderr and "was built against PyTorch 1.99.0" in result.stderr
    assert "pip install" in result.stderr
