"""The single operators of the convolution family on CUDA, without a GPU: csrc/ops/cuda_conv_bn_act.cpp and the kernels it
launches, compiled for the host (csrc/cuda/host) as operators for tensors on the CPU, against PyTorch in float64.

Every element has a bound of its own, from the roundings on its way: each is at most a UNIT of the number that is rounded, and goes
through whatever is computed of it. Summed in any order, K numbers go through at most K.
"""

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from test_cuda_host import pytestmark  # noqa: F401
from torch.nn import functional as F

# Half the distance from 1 to the next number, of 53, 24 and 8 bits.
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
TF32_UNIT = 2.0**-11  # of either operand of a product; sums are float32
FEW = 8  # roundings of an activation, or of one number on its way through batch norm
SECOND_ORDER = 1.02  # units of units
SLOPE, EPS, MOMENTUM = 0.2, 1e-3, 0.3
ACTIVATIONS = ["identity", "relu", "leaky_relu", "tanh", "sigmoid"]

NCHW, NHWC = torch.contiguous_format, torch.channels_last
LAYOUTS = {  # of input and weight
    "contiguous": (NCHW, NCHW),
    "weight in channels_last": (NCHW, NHWC),
    "input in channels_last": (NHWC, NCHW),
    "channels_last": (NHWC, NHWC),
}


@dataclass
class Arithmetic:
    dtype: torch.dtype
    tf32: bool = False  # allowed
    every_loop: bool = True  # float32_in_every_loop of csrc/cuda/host/device.h

    @property
    def sums(self):
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def unit(self):
        return UNIT[self.sums]


ARITHMETICS = {
    "float64": Arithmetic(torch.float64),
    "bfloat16": Arithmetic(torch.bfloat16),
    "float32 in every loop": Arithmetic(torch.float32),
    "float32": Arithmetic(torch.float32, every_loop=False),
    "tf32": Arithmetic(torch.float32, tf32=True, every_loop=False),
}


@dataclass
class Layer:
    transposed: bool
    channels_in: int
    channels_out: int
    size: tuple
    kernel: tuple = (4, 4)
    stride: tuple = (2, 2)
    padding: tuple = (1, 1)
    output_padding: int = 0
    groups: int = 1
    batch: int = 3
    known: bool = True  # to the main loops
    # Of output, gradient of input and of weight, those that a GPU's loops compute in float32 too, in channels_last:
    float32: str = ""
    needs_tf32: bool = False  # only where TF32 is allowed
    activates: bool = True  # the output also without batch norm

    @property
    def options(self):
        return [self.stride, self.padding, [1, 1], self.transposed, [self.output_padding] * 2, self.groups]

    def by_loops(self, arithmetic, channels_last, batch_norm):
        """Which of output, gradient of input and of weight the main loops compute; ATen does the others."""
        if not self.known or arithmetic.dtype == torch.float64:
            return ""
        if arithmetic.dtype == torch.bfloat16 or arithmetic.every_loop:
            return "oiw"
        if not channels_last or self.needs_tf32 and not arithmetic.tf32:
            return ""
        return self.float32 if self.activates or batch_norm else self.float32.replace("o", "")


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
    yield arithmetic
    torch.use_deterministic_algorithms(False)
    cuda_host.set_float32_in_every_loop(True)


# ---- a layer's exact results, and how far from them the operators may be -----------------------------------------


class Bounded:
    """Exact values and a bound of the error of each."""

    def __init__(self, exact, error):
        self.exact, self.error = exact, error

    def stored(self, dtype):
        return Bounded(self.exact, self.error + UNIT[dtype] * self.exact.abs())

    def sum(self, unit):
        """Of each channel."""
        count = self.exact.numel() / self.exact.size(1)
        error = self.error + count * unit * self.exact.abs()
        return Bounded(self.exact.sum((0, 2, 3)), error.sum((0, 2, 3)))

    def mean(self, unit):
        total, count = self.sum(unit), self.exact.numel() / self.exact.size(1)
        return Bounded(total.exact / count, total.error / count)

    def assert_holds(self, found, name):
        assert found.shape == self.exact.shape, name
        excess = (found.double() - self.exact).abs() / (SECOND_ORDER * self.error + torch.finfo(torch.float32).tiny)
        assert excess.max() <= 1, (name, excess.max().item(), self.error.max().item())


def columns(array):
    return array.double().view(1, -1, 1, 1)


class Call:
    """A layer's tensors, and its convolution and gradients from them."""

    def __init__(self, layer, arithmetic, layouts, has_bias=True, batch_norm=False, misaligned=False):
        self.layer, self.arithmetic, self.dtype = layer, arithmetic, arithmetic.dtype
        self.layouts = LAYOUTS[layouts]
        self.by_loops = layer.by_loops(arithmetic, NHWC in self.layouts, batch_norm)
        generator = torch.Generator().manual_seed(0)

        def randn(*shape, layout=NCHW, scale=1.0):
            # contiguous(memory_format=layout) would leave the strides of what has one channel or one pixel as they are.
            result = torch.empty(shape, dtype=self.dtype, memory_format=layout)
            if misaligned:
                result = torch.empty(result.numel() + 1, dtype=self.dtype)[1:].as_strided(shape, result.stride())
            return result.copy_(torch.randn(shape, generator=generator, dtype=torch.float64) * scale)

        rows, of = (layer.channels_in, layer.channels_out) if layer.transposed else (layer.channels_out, layer.channels_in)
        weight_shape = (rows, of // layer.groups, *layer.kernel)
        self.input = randn(layer.batch, layer.channels_in, *layer.size, layout=self.layouts[0])
        self.weight = randn(*weight_shape, layout=self.layouts[1], scale=layer.channels_in**-0.5 / 4)
        self.bias = randn(layer.channels_out) if has_bias else None
        self.grad = randn(*self.convolve(self.input, self.weight).shape, layout=self.layouts[1])

    # Each is linear in both arguments.
    def convolve(self, x, w):
        return torch.convolution(x, w, None, *self.layer.options)

    def grad_input(self, dy, w):
        gradients = torch.ops.aten.convolution_backward(
            dy, self.input.to(dy.dtype), w, None, *self.layer.options, [True, False, False]
        )
        return gradients[0]

    def grad_weight(self, dy, x):
        gradients = torch.ops.aten.convolution_backward(
            dy, x, self.weight.to(dy.dtype), None, *self.layer.options, [False, True, False]
        )
        return gradients[1]

    def bounded(self, part, operation, a, b, error_of_a=None):
        """operation(a, b), which is that part of by_loops."""
        a, b = a.double(), b.double()
        exact, sizes = operation(a, b), operation(a.abs(), b.abs())
        products = operation(torch.ones_like(a), torch.ones_like(b)).max()
        error = products * self.arithmetic.unit * sizes
        if part not in self.by_loops:  # twice what ATen is off, which may take sums in bfloat16
            error = error + 2 * (operation(a.to(self.dtype), b.to(self.dtype)).double() - exact).abs().max()
        elif self.arithmetic.tf32 and self.layer.needs_tf32:
            error = error + 2 * TF32_UNIT * sizes
        if error_of_a is not None:
            error = error + operation(error_of_a, b.abs())
        return Bounded(exact, error)

    def convolution(self):
        z = self.bounded("o", self.convolve, self.input, self.weight)
        if self.bias is not None:
            z = Bounded(z.exact + columns(self.bias), z.error + self.arithmetic.unit * (z.exact + columns(self.bias)).abs())
        return z if "o" in self.by_loops else z.stored(self.dtype)

    def assert_layout(self, output):
        """As F.conv2d has it on a GPU. ATen's, here on the CPU, may be another."""
        assert output.dtype == self.dtype
        if "o" in self.by_loops:
            layout = NHWC if NHWC in self.layouts else NCHW
            assert output.stride() == torch.empty(output.shape, memory_format=layout).stride()

    def assert_gradients(self, dy, grad_input, grad_weight):
        """From the gradient of the convolution's output, before it is stored."""
        dy = dy.stored(self.dtype)
        for part, operation, found, like, other in (
            ("i", self.grad_input, grad_input, self.input, self.weight),
            ("w", self.grad_weight, grad_weight, self.weight, self.input),
        ):
            exact = self.bounded(part, operation, dy.exact, other, dy.error)
            exact.stored(self.dtype).assert_holds(found, operation.__name__)
            assert found.dtype == self.dtype
            if part in self.by_loops:
                assert all(n == 1 or a == b for n, a, b in zip(like.shape, found.stride(), like.stride(), strict=True))


def watched(function, *arguments):
    """(what it returns, whether ATen has computed a convolution)."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        result = function(*arguments)
    names = {event.name for event in profiler.events()}
    return result, not names.isdisjoint({"aten::convolution", "aten::convolution_backward"})


def activate(z, activation):
    if activation == "leaky_relu":
        return F.leaky_relu(z, SLOPE)
    return z if activation == "identity" else getattr(torch, activation)(z)


def activated(z, activation, arithmetic):
    """By an activation, whose derivative is nowhere above 1."""
    exact = activate(z.exact, activation)
    return Bounded(exact, z.error + FEW * arithmetic.unit * exact.abs()).stored(arithmetic.dtype)


# ---- without batch norm ------------------------------------------------------------------------------------------


def activation_backward(grad, output, activation):
    aten = torch.ops.aten
    return {
        "identity": lambda: grad,
        "relu": lambda: aten.threshold_backward(grad, output, 0),
        "leaky_relu": lambda: aten.leaky_relu_backward(grad, output, SLOPE, True),
        "tanh": lambda: aten.tanh_backward(grad, output),
        "sigmoid": lambda: aten.sigmoid_backward(grad, output),
    }[activation]()


def conv_act_forward(operators, call, activation):
    return operators.conv_act_forward(call.input, call.weight, call.bias, *call.layer.options, activation, SLOPE)


def conv_act_backward(operators, call, output, activation, mask=(True,) * 3):
    arguments = (call.grad, call.input, call.weight, output, *call.layer.options, activation, SLOPE)
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
        check_conv_act(cuda_host, Call(LAYERS[name], arithmetic, layouts, has_bias), "leaky_relu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", ["thin image up", "down", "to one pixel", "kernel of 3"])
def test_every_activation(cuda_host, arithmetic, name, activation):
    check_conv_act(cuda_host, Call(LAYERS[name], arithmetic, "channels_last"), activation)
    call = Call(LAYERS[name], arithmetic, "channels_last", batch_norm=True)
    check_conv_bn_act(cuda_host, call, BatchNorm(call), activation)


# What a GPU's float32 loops take of layers where no tensor is aligned to 16 bytes.
MISALIGNED = {"thin image down": "oiw", "thin image up": "i", "to one pixel": "i", "down": "", "up": "", "from one pixel": ""}


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("name", MISALIGNED)
def test_misaligned_tensors(cuda_host, arithmetic, name, batch_norm):
    call = Call(LAYERS[name], arithmetic, "channels_last", batch_norm=batch_norm, misaligned=True)
    assert all(tensor.data_ptr() % 16 != 0 for tensor in (call.input, call.weight, call.bias, call.grad))
    if not arithmetic.every_loop:
        call.by_loops = "".join(part for part in call.by_loops if part in MISALIGNED[name])
    if batch_norm:
        check_conv_bn_act(cuda_host, call, BatchNorm(call), "tanh")
    else:
        check_conv_act(cuda_host, call, "tanh")


@pytest.mark.parametrize("arithmetic", ["float32", "tf32"], indirect=True)
@pytest.mark.parametrize("layouts", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", [name for name, layer in LAYERS.items() if layer.needs_tf32])
def test_tf32_is_used_where_it_is_allowed_and_in_channels_last_alone(cuda_host, arithmetic, name, layouts):
    call = Call(LAYERS[name], arithmetic, layouts, has_bias=False)
    output = conv_act_forward(cuda_host, call, "identity")
    gradients = conv_act_backward(cuda_host, call, output, "identity")
    x, w, grad = (tensor.double() for tensor in (call.input, call.weight, call.grad))
    # The two operands' roundings, spread evenly, give a product 0.6 TF32_UNITs in the mean; without, a sum of at most 16 * 16
    # float32 numbers makes as many steps of a random walk.
    tf32 = arithmetic.tf32 and layouts == "channels_last"
    least, most = (TF32_UNIT / 4, TF32_UNIT) if tf32 else (0, 16 * UNIT[torch.float32])
    for exact, found in zip((call.convolve(x, w), call.grad_input(grad, w), call.grad_weight(grad, x)), (output, *gradients)):
        assert least <= (found.double() - exact).norm() / exact.norm() <= most


# ---- with batch norm ---------------------------------------------------------------------------------------------


class BatchNorm:
    """Its arrays, and what it makes of a call's convolution."""

    def __init__(self, call, training=True, affine=True, running=True, dtype=None):
        generator = torch.Generator().manual_seed(1)
        self.call, self.training, self.unit = call, training, call.arithmetic.unit
        self.dtype = dtype or call.arithmetic.sums

        def draw(mean, std):
            return (mean + std * torch.randn(call.layer.channels_out, generator=generator)).to(self.dtype)

        self.weight, self.bias = (draw(1, 0.3), draw(0, 0.3)) if affine else (None, None)
        self.running = [draw(0, 0.3), draw(1, 0.1)] if running else [None, None]
        # How far apart numbers may be taken by batch norm, and where to.
        self.scale = columns(self.weight).abs() if affine else 1
        self.shift = columns(self.bias).abs() if affine else 0

    def pytorch(self, y, weight, bias, momentum=0.0):
        """(normalised y, new running mean, new running variance)."""
        running = [None if array is None else array.double() for array in self.running]
        return F.batch_norm(y, *running, weight, bias, self.training, momentum, EPS), *running

    def parameters(self):
        return [None if array is None else array.double().requires_grad_() for array in (self.weight, self.bias)]

    def statistics(self, y):
        """(mean, invstd) of exact y."""
        if self.training:
            var, mean = torch.var_mean(y, (0, 2, 3), correction=0)
        else:
            mean, var = (array.double() for array in self.running)
        return mean, (var + EPS).rsqrt()

    def forward(self):
        """(what is activated, mean, invstd, running mean, running variance), each Bounded; running None where there is none."""
        y = self.call.convolution().stored(self.call.dtype)
        with torch.no_grad():
            z, *running = self.pytorch(y.exact, *self.parameters(), MOMENTUM)
        mean, invstd = (Bounded(exact, 0 * exact) for exact in self.statistics(y.exact))
        deviations = y.exact - columns(mean.exact)
        if self.training:
            mean = y.mean(self.unit)
            error = y.error + columns(mean.error)
            var = Bounded(deviations.square(), (2 * deviations.abs() + error) * error).mean(self.unit)
            count = y.exact.numel() / y.exact.size(1)
            invstd.error = var.error * invstd.exact**3 / 2
            if running[0] is not None:
                errors = (mean.error, var.error * count / (count - 1))
                few = (FEW * self.unit * (old.double().abs() + new.abs()) for old, new in zip(self.running, running))
                running = [Bounded(new, MOMENTUM * e + f).stored(self.dtype) for new, e, f in zip(running, errors, few)]
        else:
            running = [Bounded(exact, 0 * exact) for exact in running]
        invstd.error = invstd.error + FEW * self.unit * invstd.exact
        error = self.scale * (columns(invstd.exact) * (y.error + columns(mean.error)) + deviations.abs() * columns(invstd.error))
        sizes = self.scale * columns(invstd.exact) * (y.exact.abs() + columns(mean.exact).abs()) + self.shift
        return Bounded(z, error + FEW * self.unit * sizes), mean, invstd, *running

    def backward(self, y, activation):
        """Gradients of (y, weight, bias), each Bounded, the latter without bounds of their own where there are none."""
        y, parameters, grad = y.double().requires_grad_(), self.parameters(), self.call.grad.double()
        z = self.pytorch(y, *parameters)[0]
        dz, dy = torch.autograd.grad(activate(z, activation), [z, y], grad)
        y, few = y.detach(), FEW * self.unit
        mean, invstd = (columns(array) for array in self.statistics(y))
        sizes = (y.abs() + mean.abs()) * invstd  # of what (y - mean) * invstd is made of
        # No activation's second derivative is above 1, and the first may jump at 0.
        rounding = few * (self.scale * sizes + self.shift)
        dz = Bounded(dz, few * (dz.abs() + grad.abs()) + grad.abs() * torch.where(z.detach().abs() > rounding, rounding, 1.0))
        dz_xhat = Bounded(dz.exact * (y - mean) * invstd, sizes * (dz.error + few * dz.exact.abs()))
        error = dz.error
        if self.training:
            means = dz.mean(self.unit), dz_xhat.mean(self.unit)
            of_mean, of_mean_xhat = (columns(m.error + few * m.exact.abs()) for m in means)
            error = error + of_mean + sizes * of_mean_xhat
        return Bounded(dy, self.scale * invstd * error), dz_xhat.sum(self.unit), dz.sum(self.unit)


def conv_bn_act_forward(operators, call, bn, activation, save=True):
    """(output, convolution, mean, invstd, running mean, running variance)."""
    running = [None if array is None else array.clone() for array in bn.running]
    arguments = (call.input, call.weight, call.bias, bn.weight, bn.bias, *running, *call.layer.options)
    return *operators.conv_bn_act_forward(*arguments, bn.training, MOMENTUM, EPS, activation, SLOPE, save), *running


def conv_bn_act_backward(operators, call, bn, y, activation, statistics=None, mask=(True,) * 5):
    mean, invstd = statistics or bn.statistics(y.double())
    mean, invstd = mean.to(call.arithmetic.sums), invstd.to(call.arithmetic.sums)
    arguments = (call.grad, call.input, call.weight, y, mean, invstd, bn.weight, bn.bias, *call.layer.options)
    return operators.conv_bn_act_backward(*arguments, bn.training, activation, SLOPE, mask)


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
    expected.insert(0, Bounded(0 * dy.sum(0).exact, 0) if bn.training else dy.sum(bn.unit))  # statistics cancel the bias
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
    check_conv_bn_act(cuda_host, call, BatchNorm(call, training), "leaky_relu")


@pytest.mark.parametrize("arguments", [dict(affine=False), dict(running=False), dict(dtype=torch.bfloat16)], ids=str)
@pytest.mark.parametrize("name", ["down", "kernel of 3"])
def test_batch_norm_with_other_arrays(cuda_host, arithmetic, name, arguments):
    if "dtype" in arguments and arithmetic.dtype != torch.bfloat16:
        pytest.skip("arrays have the dtype of the input or float32")
    call = Call(LAYERS[name], arithmetic, "channels_last", batch_norm=True)
    check_conv_bn_act(cuda_host, call, BatchNorm(call, **arguments), "sigmoid")


# ---- both --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["down", "to one pixel of three", "kernel of 3"])
def test_gradients_that_are_not_wanted_are_left_out(cuda_host, arithmetic, name):
    call = Call(LAYERS[name], arithmetic, "channels_last")
    output, bn = conv_act_forward(cuda_host, call, "relu"), BatchNorm(call)
    for backward, count in (
        (lambda mask: conv_act_backward(cuda_host, call, output, "relu", mask), 3),
        (lambda mask: conv_bn_act_backward(cuda_host, call, bn, output, "relu", mask=mask), 5),
    ):
        everything = backward([True] * count)
        for mask in itertools.product([False, True], repeat=count):
            for gradient, expected, wanted in zip(backward(mask), everything, mask, strict=True):
                assert torch.equal(gradient, expected) if wanted else gradient.shape == (0,)


@pytest.mark.parametrize("name", ["down", "kernel of 3"])
def test_empty_batch_gives_zero_gradients_and_leaves_running_statistics(cuda_host, arithmetic, name):
    call = Call(replace(LAYERS[name], batch=0), arithmetic, "contiguous")
    bn = BatchNorm(call)
    output = conv_act_forward(cuda_host, call, "relu")
    normalised, y, mean, invstd, *running = conv_bn_act_forward(cuda_host, call, bn, "relu")
    assert output.shape == normalised.shape == y.shape == call.grad.shape
    assert all(map(torch.equal, running, bn.running))
    gradients = conv_act_backward(cuda_host, call, output, "relu")
    gradients += conv_bn_act_backward(cuda_host, call, bn, y, "relu", (mean, invstd))
    like = [call.input, call.weight, call.bias]
    for gradient, tensor in zip(gradients, [*like, *like, bn.weight, bn.bias], strict=True):
        assert torch.equal(gradient, torch.zeros_like(tensor))


def test_process_group_is_refused(cuda_host):
    call = Call(LAYERS["down"], ARITHMETICS["float32"], "contiguous")
    arguments = (call.input, call.weight, *[None] * 5, *call.layer.options, True, MOMENTUM, EPS, "relu", SLOPE, False)
    with pytest.raises(NotImplementedError, match="take no process_group, got 'workers'"):
        cuda_host.conv_bn_act_forward(*arguments, "workers", 2)
