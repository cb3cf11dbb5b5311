"""Layers of the convolution family, what they give exactly, and how far from it their operators may be.

Every element has a bound of its own, from the roundings on its way: each is at most a UNIT of the number that is
rounded, and goes through whatever is computed of it. Summed in any order, K numbers go through at most K.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

# Half the distance from 1 to the next number, of 53, 24 and 8 bits.
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
TF32_UNIT = 2.0**-11  # of either operand of a product; sums are float32
FEW = 8  # roundings of an activation, or of one number on its way through batch norm
SECOND_ORDER = 1.02  # units of units
EPS, MOMENTUM = 1e-3, 0.3

# activation, negative_slope
IDENTITY, RELU, LEAKY_RELU, FALLING, TANH, SIGMOID = ACTIVATIONS = [
    ("identity", 0.0), ("relu", 0.0), ("leaky_relu", 0.2), ("leaky_relu", -0.3), ("tanh", 0.0), ("sigmoid", 0.0),
]  # fmt: skip

NCHW, NHWC = torch.contiguous_format, torch.channels_last
LAYOUTS = {  # of input and weight
    "contiguous": (NCHW, NCHW),
    "weight in channels_last": (NCHW, NHWC),
    "input in channels_last": (NHWC, NCHW),
    "channels_last": (NHWC, NHWC),
}


@dataclass
class Arithmetic:
    """What the operators may compute in."""

    dtype: torch.dtype
    tf32: bool = False  # allowed
    every_loop: bool = True  # float32_in_every_loop of csrc/cuda/host/device.h

    @property
    def sums(self):
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def unit(self):
        return UNIT[self.sums]


@dataclass
class Layer:
    """A layer's shape, and which of its convolutions the main loops compute."""

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


def activate(z, activation):
    name, negative_slope = activation
    if name == "leaky_relu":
        return F.leaky_relu(z, negative_slope)
    return z if name == "identity" else getattr(torch, name)(z)


def activated(z, activation, arithmetic):
    """By an activation, whose derivative is nowhere above 1."""
    exact = activate(z.exact, activation)
    return Bounded(exact, z.error + FEW * arithmetic.unit * exact.abs()).stored(arithmetic.dtype)


def activation_backward(grad, output, activation):
    aten, (name, negative_slope) = torch.ops.aten, activation
    return {
        "identity": lambda: grad,
        "relu": lambda: aten.threshold_backward(grad, output, 0),
        "leaky_relu": lambda: aten.leaky_relu_backward(grad, output, negative_slope, True),
        "tanh": lambda: aten.tanh_backward(grad, output),
        "sigmoid": lambda: aten.sigmoid_backward(grad, output),
    }[name]()


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

        channels = (layer.channels_out, layer.channels_in)
        first, second = reversed(channels) if layer.transposed else channels
        weight_shape = (first, second // layer.groups, *layer.kernel)
        self.input = randn(layer.batch, layer.channels_in, *layer.size, layout=self.layouts[0])
        self.weight = randn(*weight_shape, layout=self.layouts[1], scale=layer.channels_in**-0.5 / 4)  # for sums near 1
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
            exact = z.exact + columns(self.bias)
            z = Bounded(exact, z.error + self.arithmetic.unit * exact.abs())
        return z if "o" in self.by_loops else z.stored(self.dtype)

    def assert_layout(self, output):
        """As F.conv2d has it on a GPU. ATen's, here on the CPU, may be another."""
        assert output.dtype == self.dtype
        if "o" in self.by_loops:
            layout = NHWC if NHWC in self.layouts else NCHW
            assert output.stride() == torch.empty(output.shape, memory_format=layout).stride(), output.stride()

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
                strides = zip(like.shape, found.stride(), like.stride(), strict=True)
                assert all(size == 1 or a == b for size, a, b in strides), (operation.__name__, found.stride())


class BatchNorm:
    """Its arrays, and what it makes of a call's convolution."""

    def __init__(self, call, training=True, affine=True, running=True, like_input=False):
        self.call, self.training, self.unit = call, training, call.arithmetic.unit
        self.dtype = call.dtype if like_input else call.arithmetic.sums
        size, generator = call.layer.channels_out, torch.Generator().manual_seed(1)

        def draw(mean, std):
            return (mean + std * torch.randn(size, generator=generator)).to(self.dtype)

        self.weight, self.bias = (draw(1, 0.3), draw(0, 0.3)) if affine else (None, None)
        self.running = [draw(0, 0.3), draw(1, 0.1)] if running else [None, None]
        arrays = [self.weight, self.bias] if affine else [draw(1, 0), draw(0, 0)]
        self.parameters = [array.double().clone().requires_grad_() for array in arrays]
        # How much they make of a number's error, and add to its size.
        self.scale, self.shift = (columns(array.detach().abs()) for array in self.parameters)

    def pytorch(self, y, momentum=0.0):
        """(normalised y, new running mean, new running variance)."""
        running = [None if array is None else array.double().clone() for array in self.running]
        return F.batch_norm(y, *running, *self.parameters, self.training, momentum, EPS), *running

    def statistics(self, y):
        """(mean, invstd) of exact y."""
        if self.training:
            var, mean = torch.var_mean(y, (0, 2, 3), correction=0)
        else:
            mean, var = (array.double() for array in self.running)
        return mean, (var + EPS).rsqrt()

    def forward(self):
        """(what is activated, mean, invstd, running mean, running variance), Bounded or, the last two, None."""
        y = self.call.convolution().stored(self.call.dtype)
        with torch.no_grad():
            z, *running = self.pytorch(y.exact, MOMENTUM)
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
        error = columns(invstd.exact) * (y.error + columns(mean.error)) + columns(invstd.error) * deviations.abs()
        sizes = self.scale * columns(invstd.exact) * (y.exact.abs() + columns(mean.exact).abs()) + self.shift
        return Bounded(z, self.scale * error + FEW * self.unit * sizes), mean, invstd, *running

    def backward(self, y, activation):
        """Gradients of (y, the convolution's bias, weight, bias), Bounded, before they are stored."""
        y, grad = y.double().requires_grad_(), self.call.grad.double()
        z = self.pytorch(y)[0]
        dz, dy, *of_parameters = torch.autograd.grad(activate(z, activation), [z, y, *self.parameters], grad)
        y, few = y.detach(), FEW * self.unit
        mean, invstd = (columns(array) for array in self.statistics(y))
        sizes = (y.abs() + mean.abs()) * invstd  # of what (y - mean) * invstd is made of
        # No activation's second derivative is above 1, and the first may jump at 0.
        rounding = few * (self.scale * sizes + self.shift)
        of_derivative = torch.where(z.detach().abs() > rounding, few + rounding, 1.0)
        dz = Bounded(dz, few * dz.abs() + of_derivative * grad.abs())
        dz_xhat = Bounded(dz.exact * (y - mean) * invstd, sizes * (dz.error + few * dz.exact.abs()))
        error = dz.error
        if self.training:
            means = dz.mean(self.unit), dz_xhat.mean(self.unit)
            of_mean, of_mean_xhat = (columns(m.error + few * m.exact.abs()) for m in means)
            error = error + of_mean + sizes * of_mean_xhat
        dy = Bounded(dy, self.scale * invstd * error)
        of_bias = dy.sum(self.unit)
        if self.training:  # batch statistics cancel it
            of_bias = Bounded(0 * of_bias.exact, 0 * of_bias.error)
        errors = (dz_xhat.sum(self.unit).error, dz.sum(self.unit).error)
        return dy, of_bias, *map(Bounded, of_parameters, errors)
