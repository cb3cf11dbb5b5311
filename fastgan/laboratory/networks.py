"""Many small multilayer perceptrons trained side by side, with gradients written out by hand.

Networks of eleven units cost nothing to compute; what takes the time is calling operators. So the networks of all
seeds are stacked along a first dimension, and backward and Adam are written here, without autograd's bookkeeping:
a step of ten seeds takes about a millisecond on one core. torch.compile would ask for a compiler on the user's machine.
"""

import math

import torch
from torch import Tensor


class StackedMLP:
    """``copies`` independent perceptrons of one shape: tanh in the hidden layers, linear output.

    Samples are columns: with so few units and many samples the products are several times as fast as on rows.

    Args:
        widths: units of every layer, the input's first.
        copies: networks in the stack.
        input_scale: typical size of the input; the first layer's weights are drawn so that its units see about one.
        generator: source of the initial weights.

    Attributes:
        parameters: float32 [P], all weights and biases, tensor after tensor, each with all copies of it.
        gradients: float32 [P], what the last ``backward`` found.
    """

    def __init__(self, widths: list[int], copies: int, input_scale: float, generator: torch.Generator):
        self.copies = copies
        self.shapes = list(zip(widths, widths[1:]))
        size = copies * sum((fan_in + 1) * fan_out for fan_in, fan_out in self.shapes)
        self.parameters = torch.empty(size)
        self.gradients = torch.zeros(size)
        self.layers, self.layer_gradients = self._views(self.parameters), self._views(self.gradients)
        for number, (weight, bias) in enumerate(self.layers):
            scale = input_scale if number == 0 else 1.0
            weight.normal_(0, math.sqrt(2 / (weight.shape[2] + 1)) / scale, generator=generator)
            # Spread over the first layer, so that its units bend at different places of the input.
            bias.uniform_(-1, 1, generator=generator) if number == 0 else bias.zero_()

    def _views(self, flat: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Weight [copies, out, in] and bias [copies, out, 1] of every layer, inside ``flat`` and contiguous."""
        sizes = [rows * fan_out for fan_in, fan_out in self.shapes for rows in (self.copies * fan_in, self.copies)]
        parts = iter(flat.split(sizes))
        return [
            (next(parts).view(self.copies, fan_out, fan_in), next(parts).view(self.copies, fan_out, 1))
            for fan_in, fan_out in self.shapes
        ]

    def gradient_norms(self) -> Tensor:
        """Norm of every copy's gradient, [copies]."""
        return torch.cat([part.flatten(1) for layer in self.layer_gradients for part in layer], 1).norm(dim=1)

    def first_nonfinite(self, output: Tensor) -> tuple[int, str, list[int]] | None:
        """Where the first value arose that is not finite, in the order of the computation, after :meth:`forward` gave ``output``.

        Returns:
            The layer, from 1; ``"weight"``, ``"bias"`` or ``"output"``; and the copies that have such a value there, from 0.
            None where all are finite.
        """
        outputs = [*self.inputs[1:], output]
        for number, (layer, result) in enumerate(zip(self.layers, outputs), 1):
            for kind, tensor in zip(("weight", "bias", "output"), (*layer, result)):
                if copies := (~tensor.isfinite()).flatten(1).any(1).nonzero()[:, 0].tolist():
                    return number, kind, copies
        return None

    def forward(self, x: Tensor) -> Tensor:
        """x [copies, in, N] to outputs [copies, out, N]; remembered for :meth:`backward`."""
        self.inputs = [x]
        for weight, bias in self.layers[:-1]:
            x = (torch.baddbmm(bias, weight, x) if x.shape[1] > 1 else torch.addcmul(bias, weight, x)).tanh_()
            self.inputs.append(x)
        weight, bias = self.layers[-1]
        return torch.baddbmm(bias, weight, x)

    def backward(self, gradient: Tensor, *, weights: bool = True, input: bool = False) -> Tensor | None:
        """Gradients of a loss from its gradient for the last output, [copies, out, N].

        Args:
            weights: fill ``gradients``; without, the network is only passed through.
            input: whether the input's gradient is wanted.

        Returns:
            Gradient for the input [copies, in, N], or None.
        """
        for number in reversed(range(len(self.layers))):
            x, (weight, _) = self.inputs[number], self.layers[number]
            if weights:
                weight_gradient, bias_gradient = self.layer_gradients[number]
                torch.bmm(gradient, x.mT, out=weight_gradient)
                torch.sum(gradient, 2, keepdim=True, out=bias_gradient)
            if number > 0:
                # tanh' = 1 - tanh^2, from the activation itself
                gradient = torch.ops.aten.tanh_backward(_product(weight.mT, gradient), x)
            elif input:
                return _product(weight.mT, gradient)
        return None


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Matrix products [copies, M, K] x [copies, K, N]; with K = 1 a multiplication is faster."""
    return torch.bmm(left, right) if left.shape[2] > 1 else left * right


class Adam:
    """Adam (Kingma and Ba 2015) on one flat tensor of parameters."""

    def __init__(self, parameters: Tensor, beta1: float, beta2: float, eps: float = 1e-8):
        self.parameters, self.beta1, self.beta2, self.eps = parameters, beta1, beta2, eps
        self.mean, self.square = torch.zeros_like(parameters), torch.zeros_like(parameters)
        self.steps = 0

    def step(self, gradients: Tensor, learning_rate: float) -> None:
        self.steps += 1
        self.mean.lerp_(gradients, 1 - self.beta1)
        self.square.mul_(self.beta2).addcmul_(gradients, gradients, value=1 - self.beta2)
        correction = math.sqrt(1 - self.beta2**self.steps)
        denominator = self.square.sqrt().add_(self.eps * correction)
        self.parameters.addcdiv_(self.mean, denominator, value=-learning_rate * correction / (1 - self.beta1**self.steps))
