"""Many small multilayer perceptrons trained side by side, with gradients written out by hand.

Networks of eleven units cost nothing to compute; what takes the time is calling operators. So the networks of all
seeds are stacked along a first dimension, and backward and Adam are written here, without autograd's bookkeeping:
a step of ten seeds takes 0.5 ms on one core. torch.compile would ask for a compiler on the user's machine.
"""

import math

import torch
from torch import Tensor


class StackedMLP:
    """``copies`` independent perceptrons of one shape: tanh in the hidden layers, linear output.

    Args:
        widths: units of every layer, the input's first.
        copies: networks in the stack.
        input_scale: typical size of the input; the first layer's weights are drawn so that its units see about one.
        generator: source of the initial weights.

    Attributes:
        parameters: float32 [copies, P], all weights and biases.
        gradients: float32 [copies, P], what the last ``backward`` found.
    """

    def __init__(self, widths: list[int], copies: int, input_scale: float, generator: torch.Generator):
        self.shapes = list(zip(widths, widths[1:]))
        size = sum((fan_in + 1) * fan_out for fan_in, fan_out in self.shapes)
        self.parameters = torch.empty(copies, size)
        self.gradients = torch.zeros(copies, size)
        self.layers, self.layer_gradients = self._views(self.parameters), self._views(self.gradients)
        for number, (weight, bias) in enumerate(self.layers):
            scale = input_scale if number == 0 else 1.0
            weight.normal_(0, math.sqrt(2 / (weight.shape[1] + 1)) / scale, generator=generator)
            # Spread over the first layer, so that its units bend at different places of the input.
            bias.uniform_(-1, 1, generator=generator) if number == 0 else bias.zero_()

    def _views(self, flat: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Weight [copies, in, out] and bias [copies, 1, out] of every layer, inside ``flat``."""
        views, start = [], 0
        for fan_in, fan_out in self.shapes:
            middle, end = start + fan_in * fan_out, start + (fan_in + 1) * fan_out
            weight = flat[:, start:middle].view(-1, fan_in, fan_out)
            views.append((weight, flat[:, middle:end].view(-1, 1, fan_out)))
            start = end
        return views

    def forward(self, x: Tensor) -> Tensor:
        """x [copies, N, in] to outputs [copies, N, out]; remembered for :meth:`backward`."""
        self.inputs = [x]
        for weight, bias in self.layers[:-1]:
            x = torch.baddbmm(bias, x, weight).tanh_()
            self.inputs.append(x)
        weight, bias = self.layers[-1]
        return torch.baddbmm(bias, x, weight)

    def backward(self, gradient: Tensor, *, weights: bool = True, input: bool = False) -> Tensor | None:
        """Gradients of a loss from its gradient for the last output, [copies, N, out].

        Args:
            weights: fill ``gradients``; without, the network is only passed through.
            input: whether the input's gradient is wanted.

        Returns:
            Gradient for the input [copies, N, in], or None.
        """
        for number in reversed(range(len(self.layers))):
            x, (weight, _) = self.inputs[number], self.layers[number]
            if weights:
                weight_gradient, bias_gradient = self.layer_gradients[number]
                torch.bmm(x.mT, gradient, out=weight_gradient)
                torch.sum(gradient, 1, keepdim=True, out=bias_gradient)
            if number > 0:
                # tanh' = 1 - tanh^2, from the activation itself
                gradient = torch.ops.aten.tanh_backward(torch.bmm(gradient, weight.mT), x)
            elif input:
                return torch.bmm(gradient, weight.mT)
        return None


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
