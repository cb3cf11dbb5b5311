"""The single operators of the convolution family on CUDA, without a GPU: csrc/ops/cuda_conv_bn_act.cpp and the kernels
it launches, compiled for the host (csrc/cuda/host) as operators for tensors on the CPU, against PyTorch in float64:
no element is further from it than its roundings allow (conv_bounds.py)."""

import itertools
from dataclasses import replace

import pytest
import torch
from conv_bounds import (
    ACTIVATIONS, EPS, FALLING, FEW, IDENTITY, LAYOUTS, LEAKY_RELU, MOMENTUM, RELU, SIGMOID, TANH, TF32_UNIT, UNIT,
    Arithmetic, BatchNorm, Bounded, Call, Layer, activated, activation_backward,
)
from test_cuda_host import pytestmark  # noqa: F401

ARITHMETICS = {
    "float64": Arithmetic(torch.float64),
    "bfloat16": Arithmetic(torch.bfloat16),
    "float32 in every loop": Arithmetic(torch.float32),
    "float32": Arithmetic(torch.float32, every_loop=False),
    "tf32": Arithmetic(torch.float32, tf32=True, every_loop=False),
}

THIN = dict(float32="oiw", needs_tf32=True)
PIXEL = dict(stride=(1, 1), padding=(0, 0))
LAYERS = {
    "thin image down": Layer(False, 3, 64, (8, 6), **THIN),
    "thin image of one channel down": Layer(False, 1, 64, (9, 7), **THIN),
    "thin image up": Layer(True, 64, 3, (5, 4), **THIN),
    "thin image of one channel up": Layer(True, 64, 1, (3, 6), **THIN),
    "down": Layer(False, 16, 8, (6, 8)),
    "up": Layer(True, 16, 8, (4, 3)),
    "odd channels down": Layer(False, 5, 7, (7, 9)),
    "odd channels up": Layer(True, 5, 7, (3, 4), output_padding=1),
    "tiles of 128": Layer(True, 72, 136, (4, 4), batch=5),
    "to one pixel": Layer(False, 16, 1, (4, 4), float32="oiw", **PIXEL),
    "to one pixel of three": Layer(False, 6, 3, (4, 4), float32="ow", **PIXEL),  # 6 floats are not whole times 16 bytes
    "to one pixel of many": Layer(False, 12, 24, (4, 4), **PIXEL),
    "from one pixel": Layer(True, 12, 32, (1, 1), **PIXEL),
    "from one pixel of three": Layer(True, 3, 8, (1, 1), float32="oiw", activates=False, **PIXEL),
    # In each of these, one thing keeps the loops away.
    "stride 1 to many pixels": Layer(False, 8, 4, (6, 6), known=False, **PIXEL),
    "kernel of 3": Layer(False, 5, 6, (6, 6), kernel=(3, 3), known=False),
    "kernel of 4 and 5": Layer(False, 4, 8, (8, 9), kernel=(4, 5), known=False),
    "kernel of 5 and 4": Layer(True, 4, 8, (4, 3), kernel=(5, 4), known=False),
    "strides of 2 and 1": Layer(False, 4, 8, (8, 6), stride=(2, 1), padding=(1, 0), known=False),
    "strides of 1 and 2": Layer(True, 4, 8, (1, 3), stride=(1, 2), padding=(0, 1), known=False),
    "two groups down": Layer(False, 8, 4, (8, 6), groups=2, known=False),
    "two groups up": Layer(True, 8, 4, (4, 3), groups=2, known=False),
}


@pytest.fixture(params=ARITHMETICS)
def arithmetic(request, cuda_host, monkeypatch):
    arithmetic = ARITHMETICS[request.param]
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", arithmetic.tf32)
    cuda_host.set_float32_in_every_loop(arithmetic.every_loop)
    torch.use_deterministic_algorithms(True)  # fills what is allocated with NaN
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine, waiting for others takes longer than these layers
    yield arithmetic
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    cuda_host.set_float32_in_every_loop(True)


def watched(function, *arguments):
    """(what it returns, whether ATen has computed a convolution)."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        result = function(*arguments)
    names = {event.name for event in profiler.events()}
    return result, not names.isdisjoint({"aten::convolution", "aten::convolution_backward"})


# ---- without batch norm ------------------------------------------------------------------------------------------


def conv_act_forward(operators, call, activation):
    return operators.conv_act_forward(call.input, call.weight, call.bias, *call.layer.options, *activation)


def conv_act_backward(operators, call, output, activation, mask=(True,) * 3):
    arguments = (call.grad, call.input, call.weight, output, *call.layer.options, *activation)
    return operators.conv_act_backward(*arguments, mask)


def check_conv_act(operators, call, activation):
    output, by_aten = watched(conv_act_forward, operators, call, activation)
    activated(call.convolution(), activation, call.arithmetic).assert_holds(output, "output")
    call.assert_layout(output)
    assert by_aten == ("o" not in call.by_loops)

    gradients, by_aten = watched(conv_act_backward, operators, call, output, activation)
    exact = activation_backward(call.grad.double(), output.double(), activation)
    dy = Bounded(exact, FEW * call.arithmetic.unit * call.grad.double().abs())
    call.assert_gradients(dy, *gradients[:2])
    dy.stored(call.dtype).sum(call.arithmetic.unit).stored(call.dtype).assert_holds(gradients[2], "gradient of bias")
    assert gradients[2].dtype == call.dtype
    assert by_aten == (not {"i", "w"} <= set(call.by_loops))


@pytest.mark.parametrize("layouts", LAYOUTS)
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_in_every_layout(cuda_host, arithmetic, name, layouts):
    for has_bias in (True, False):
        check_conv_act(cuda_host, Call(LAYERS[name], arithmetic, layouts, has_bias), LEAKY_RELU)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda activation: f"{activation[0]}({activation[1]})")
@pytest.mark.parametrize("name", ["thin image up", "down", "to one pixel", "kernel of 3"])
def test_every_activation(cuda_host, arithmetic, name, activation):
    if activation != FALLING:  # conv_act in csrc/ops/conv_bn_act.cpp runs ATen's
        check_conv_act(cuda_host, Call(LAYERS[name], arithmetic, "channels_last"), activation)
    call = Call(LAYERS[name], arithmetic, "channels_last", batch_norm=True)
    check_conv_bn_act(cuda_host, call, BatchNorm(call), activation)


# What a GPU's float32 loops take of layers where no tensor is aligned to 16 bytes.
MISALIGNED = {
    "thin image down": "oiw", "thin image up": "i", "to one pixel": "i", "down": "", "up": "", "from one pixel": "",
}  # fmt: skip


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("name", MISALIGNED)
def test_misaligned_tensors(cuda_host, arithmetic, name, batch_norm):
    call = Call(LAYERS[name], arithmetic, "channels_last", batch_norm=batch_norm, misaligned=True)
    assert all(tensor.data_ptr() % 16 != 0 for tensor in (call.input, call.weight, call.bias, call.grad))
    if not arithmetic.every_loop:
        call.by_loops = "".join(part for part in call.by_loops if part in MISALIGNED[name])
    if batch_norm:
        check_conv_bn_act(cuda_host, call, BatchNorm(call), TANH)
    else:
        check_conv_act(cuda_host, call, TANH)


@pytest.mark.parametrize("arithmetic", ["float32", "tf32"], indirect=True)
@pytest.mark.parametrize("layouts", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", [name for name, layer in LAYERS.items() if layer.needs_tf32])
def test_tf32_is_used_where_it_is_allowed_and_in_channels_last_alone(cuda_host, arithmetic, name, layouts):
    call = Call(LAYERS[name], arithmetic, layouts, has_bias=False)
    output = conv_act_forward(cuda_host, call, IDENTITY)
    gradients = conv_act_backward(cuda_host, call, output, IDENTITY)
    x, w, grad = (tensor.double() for tensor in (call.input, call.weight, call.grad))
    # The two operands' roundings, spread evenly, give a product 0.6 TF32_UNITs in the mean; without, a sum of at most
    # 16 * 16 float32 numbers makes as many steps of a random walk.
    tf32 = arithmetic.tf32 and layouts == "channels_last"
    least, most = (TF32_UNIT / 4, TF32_UNIT) if tf32 else (0, 16 * UNIT[torch.float32])
    exact = (call.convolve(x, w), call.grad_input(grad, w), call.grad_weight(grad, x))
    for e, found in zip(exact, (output, *gradients)):
        assert least <= (found.double() - e).norm() / e.norm() <= most


# ---- with batch norm ---------------------------------------------------------------------------------------------


def conv_bn_act_forward(operators, call, bn, activation, save=True):
    """(output, convolution, mean, invstd, running mean, running variance)."""
    running = [None if array is None else array.clone() for array in bn.running]
    arguments = (call.input, call.weight, call.bias, bn.weight, bn.bias, *running, *call.layer.options)
    return *operators.conv_bn_act_forward(*arguments, bn.training, MOMENTUM, EPS, *activation, save), *running


def conv_bn_act_backward(operators, call, bn, y, activation, statistics=None, mask=(True,) * 5):
    mean, invstd = statistics or bn.statistics(y.double())
    mean, invstd = mean.to(call.arithmetic.sums), invstd.to(call.arithmetic.sums)
    arguments = (call.grad, call.input, call.weight, y, mean, invstd, bn.weight, bn.bias, *call.layer.options)
    return operators.conv_bn_act_backward(*arguments, bn.training, *activation, mask)


def check_conv_bn_act(operators, call, bn, activation):
    (output, y, *arrays), by_aten = watched(conv_bn_act_forward, operators, call, bn, activation)
    z, *expected = bn.forward()
    call.convolution().stored(call.dtype).assert_holds(y, "convolution")
    activated(z, activation, call.arithmetic).assert_holds(output, "output")
    for bounded, array, name in zip(expected, arrays, ("mean", "invstd", "running mean", "running variance")):
        if array is not None:
            bounded.assert_holds(array, name)
    call.assert_layout(output)
    assert by_aten == ("o" not in call.by_loops)
    unsaved, nothing, *_ = conv_bn_act_forward(operators, call, bn, activation, save=False)
    assert torch.equal(unsaved, output) and unsaved.stride() == output.stride() and nothing.shape == (0,)

    gradients, by_aten = watched(conv_bn_act_backward, operators, call, bn, y, activation)
    dy, *expected = bn.backward(y, activation)
    call.assert_gradients(dy, *gradients[:2])
    names, like = ("bias", "bn_weight", "bn_bias"), (call.bias, bn.weight, bn.bias)
    for bounded, gradient, array, name in zip(expected, gradients[2:], like, names, strict=True):
        if array is None:
            assert gradient.shape == (0,)
        else:
            assert gradient.dtype == array.dtype
            bounded.stored(array.dtype).assert_holds(gradient, f"gradient of {name}")
    assert by_aten == (not {"i", "w"} <= set(call.by_loops))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layouts", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", LAYERS)
def test_batch_norm_after_every_layer(cuda_host, arithmetic, name, layouts, training):
    call = Call(LAYERS[name], arithmetic, layouts, batch_norm=True)
    check_conv_bn_act(cuda_host, call, BatchNorm(call, training), LEAKY_RELU)


@pytest.mark.parametrize("arguments", [dict(affine=False), dict(running=False), dict(like_input=True)], ids=str)
@pytest.mark.parametrize("name", ["down", "kernel of 3"])
def test_batch_norm_with_other_arrays(cuda_host, arithmetic, name, arguments):
    call = Call(LAYERS[name], arithmetic, "channels_last", batch_norm=True)
    check_conv_bn_act(cuda_host, call, BatchNorm(call, **arguments), SIGMOID)


# ---- both --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["down", "to one pixel of three", "kernel of 3"])
def test_gradients_that_are_not_wanted_are_left_out(cuda_host, arithmetic, name):
    call = Call(LAYERS[name], arithmetic, "channels_last")
    output, bn = conv_act_forward(cuda_host, call, RELU), BatchNorm(call)
    for backward, count in (
        (lambda mask: conv_act_backward(cuda_host, call, output, RELU, mask), 3),
        (lambda mask: conv_bn_act_backward(cuda_host, call, bn, output, RELU, mask=mask), 5),
    ):
        everything = backward([True] * count)
        for mask in itertools.product([False, True], repeat=count):
            for gradient, expected, wanted in zip(backward(mask), everything, mask, strict=True):
                assert torch.equal(gradient, expected) if wanted else gradient.shape == (0,)


@pytest.mark.parametrize("name", ["down", "kernel of 3"])
def test_empty_batch_gives_zero_gradients_and_leaves_running_statistics(cuda_host, arithmetic, name):
    call = Call(replace(LAYERS[name], batch=0), arithmetic, "contiguous")
    bn = BatchNorm(call)
    output = conv_act_forward(cuda_host, call, RELU)
    normalised, y, mean, invstd, *running = conv_bn_act_forward(cuda_host, call, bn, RELU)
    assert output.shape == normalised.shape == y.shape == call.grad.shape
    assert all(map(torch.equal, running, bn.running))
    gradients = conv_act_backward(cuda_host, call, output, RELU)
    gradients += conv_bn_act_backward(cuda_host, call, bn, y, RELU, (mean, invstd))
    like = [call.input, call.weight, call.bias]
    for gradient, tensor in zip(gradients, [*like, *like, bn.weight, bn.bias], strict=True):
        assert torch.equal(gradient, torch.zeros_like(tensor))


def test_process_group_is_refused(cuda_host):
    call = Call(LAYERS["down"], ARITHMETICS["float32"], "contiguous")
    arguments = (call.input, call.weight, *[None] * 5, *call.layer.options, True, MOMENTUM, EPS, *RELU, False)
    with pytest.raises(NotImplementedError, match="take no process_group, got 'workers'"):
        cuda_host.conv_bn_act_forward(*arguments, "workers", 2)
