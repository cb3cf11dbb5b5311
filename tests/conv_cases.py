"""Random and listed calls of the convolution family, for tests and benchmarks."""

import random
from dataclasses import dataclass

import torch

from fastgan import ops
from fastgan.ops.conv2d_bn_act import conv2d_act_reference, conv2d_bn_act_reference
from fastgan.ops.conv_transpose2d_bn_act import conv_transpose2d_act_reference, conv_transpose2d_bn_act_reference

OPS = {
    "conv2d_bn_act": (ops.conv2d_bn_act, conv2d_bn_act_reference),
    "conv_transpose2d_bn_act": (ops.conv_transpose2d_bn_act, conv_transpose2d_bn_act_reference),
    "conv2d_act": (ops.conv2d_act, conv2d_act_reference),
    "conv_transpose2d_act": (ops.conv_transpose2d_act, conv_transpose2d_act_reference),
}
TENSORS = ("input", "weight", "bias", "bn_weight", "bn_bias")


@dataclass
class Case:
    """One call: tensors are made anew by make(), in any dtype, from the same numbers."""

    op: str
    input_shape: tuple
    weight_shape: tuple
    options: dict
    bias: bool = True
    affine: bool = True
    running: bool = True
    layout: str = "contiguous"
    grad_layout: str = "contiguous"
    seed: int = 0

    @property
    def channels(self):
        transposed = "transpose" in self.op
        return self.weight_shape[1] * self.options.get("groups", 1) if transposed else self.weight_shape[0]

    def make(self, dtype=torch.float64, device="cpu"):
        """(differentiable tensors by name, running statistics by name)."""
        generator = torch.Generator().manual_seed(self.seed)

        def randn(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        tensors = {"input": randn(*self.input_shape), "weight": randn(*self.weight_shape) * 0.3}
        if self.bias:
            tensors["bias"] = randn(self.channels)
        running = {}
        if self.op.endswith("bn_act"):
            if self.affine:
                tensors |= {"bn_weight": 1 + 0.3 * randn(self.channels), "bn_bias": randn(self.channels)}
            if self.running:
                running = {"running_mean": randn(self.channels), "running_var": 0.5 + randn(self.channels) ** 2}
        tensors = {name: lay_out(value.to(dtype), self.layout if name == "input" else "contiguous").to(device)
                   for name, value in tensors.items()}  # fmt: skip
        return (
            {name: value.detach().requires_grad_() for name, value in tensors.items()},
            {name: value.to(dtype).to(device) for name, value in running.items()},
        )

    def grad_output(self, output):
        values = torch.randn(output.shape, generator=torch.Generator().manual_seed(self.seed + 1), dtype=torch.float64)
        if self.grad_layout == "expanded":  # what sum().backward() sends: strides of 0
            return torch.full([1] * output.dim(), 0.7, dtype=output.dtype, device=output.device).expand(output.shape)
        return lay_out(values.to(output.dtype), self.grad_layout).to(output.device)

    def run(self, function, dtype=torch.float64, device="cpu"):
        """(output, gradients by name, running statistics by name)."""
        tensors, running = self.make(dtype, device)
        output = function(**tensors, **running, **self.options)
        gradients = torch.autograd.grad(output, list(tensors.values()), self.grad_output(output))
        return output.detach(), dict(zip(tensors, gradients)), running


def lay_out(tensor, layout):
    """The same values in another memory layout."""
    if layout == "contiguous" or tensor.dim() < 3:
        return tensor.contiguous()
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor
    if layout == "transposed":  # rows and columns swapped in memory
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert layout == "strided"  # every second element of a larger tensor
    wide = tensor.new_zeros(*tensor.shape[:-1], 2 * tensor.shape[-1])
    wide[..., ::2] = tensor
    return wide[..., ::2]


def random_case(seed):
    """Any combination that PyTorch accepts."""
    rng = random.Random(seed)
    op = rng.choice(list(OPS))
    transposed, has_bn = "transpose" in op, op.endswith("bn_act")
    groups = rng.choice([1, 1, 1, 2, 3])
    c_in, c_out = groups * rng.randint(1, 4), groups * rng.randint(1, 4)
    kernel = rng.choice([(4, 4), (4, 4), (1, 1), (3, 3), (2, 5), (5, 3)])
    pair = lambda low, high: rng.choice([rng.randint(low, high), (rng.randint(low, high), rng.randint(low, high))])  # noqa: E731
    options = dict(stride=pair(1, 3), dilation=pair(1, 2), padding=pair(0, 3), groups=groups)
    at = lambda value, dim: value if isinstance(value, int) else value[dim]  # noqa: E731
    reach = [at(options["dilation"], d) * (kernel[d] - 1) + 1 for d in range(2)]
    size = []
    for d in range(2):
        least = 1
        if transposed:
            while (least - 1) * at(options["stride"], d) - 2 * at(options["padding"], d) + reach[d] < 1:
                least += 1
        else:
            least = max(1, reach[d] - 2 * at(options["padding"], d))
        size.append(least + rng.randint(0, 5))
    if transposed:
        options["output_padding"] = tuple(
            rng.randint(0, max(at(options["stride"], d), at(options["dilation"], d)) - 1) for d in range(2)
        )
    options["activation"] = rng.choice(ops.ACTIVATIONS)
    options["negative_slope"] = rng.choice([0.2, 0.01, 0.0, 1.5, -0.3])
    batch = rng.choice([2, 2, 3, 5])
    unbatched = rng.random() < 0.1
    running = True
    if has_bn:
        training = rng.random() < 0.7
        running = not training or rng.random() < 0.7
        options |= dict(training=training, momentum=rng.choice([0.1, 0.0, 1.0, 0.37]), eps=rng.choice([1e-5, 1e-3, 0.5]))
        unbatched = False if training else unbatched
    weight = (c_in, c_out // groups, *kernel) if transposed else (c_out, c_in // groups, *kernel)
    layouts = ["contiguous", "channels_last", "transposed", "strided"]
    return Case(
        op, (c_in, *size) if unbatched else (batch, c_in, *size), weight, options,
        bias=rng.random() < 0.5, affine=rng.random() < 0.7, running=running, layout=rng.choice(layouts),
        grad_layout=rng.choice([*layouts, "expanded"]), seed=seed,
    )  # fmt: skip


def dcgan_case(op, channels_in, channels_out, size, batch=2, kernel=4, stride=2, padding=1, seed=0, **options):
    """A layer of a DCGAN."""
    weight = (channels_in, channels_out, kernel, kernel)
    if "transpose" not in op:
        weight = (channels_out, channels_in, kernel, kernel)
    return Case(op, (batch, channels_in, size, size), weight, dict(stride=stride, padding=padding, **options), seed=seed)
