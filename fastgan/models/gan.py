"""GAN of multilayer perceptrons (Goodfellow et al. 2014, arXiv 1406.2661), on data taken as plain vectors."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from fastgan._arguments import check_counts, check_integer

OUTPUT_ACTIVATIONS = {"tanh": nn.Tanh, "linear": nn.Identity}


class StackedLinear(nn.Module):
    """``copies`` independent linear layers applied to the equal parts of a batch.

    The k-th of the ``copies`` equal parts of the input [copies * N, in_features] goes through the k-th
    layer; the output has shape [copies * N, out_features]. Networks too small to keep a machine busy
    train many times faster side by side than one after the other.
    """

    def __init__(self, in_features: int, out_features: int, copies: int):
        super().__init__()
        bound = 1 / math.sqrt(in_features)  # as nn.Linear
        self.weight = nn.Parameter(torch.empty(copies, in_features, out_features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(copies, 1, out_features).uniform_(-bound, bound))

    def forward(self, input: Tensor) -> Tensor:
        copies, in_features, _ = self.weight.shape
        if len(input) % copies:
            raise ValueError(f"StackedLinear: the batch must divide into {copies} equal parts, got {len(input)} samples")
        return torch.baddbmm(self.bias, input.reshape(copies, -1, in_features), self.weight).flatten(0, 1)

    def extra_repr(self) -> str:
        copies, in_features, out_features = self.weight.shape
        return f"in_features={in_features}, out_features={out_features}, copies={copies}"


class MLPGenerator(nn.Module):
    """Latent vectors z [N, latent_dim] to samples ``[N, *data_shape]``; built by :func:`mlp_gan`."""

    def __init__(self, data_shape: tuple[int, ...], latent_dim: int, main: nn.Sequential):
        super().__init__()
        self.data_shape, self.latent_dim, self.main = data_shape, latent_dim, main

    def forward(self, z: Tensor) -> Tensor:
        if z.dim() != 2 or z.shape[1] != self.latent_dim:
            raise ValueError(f"MLPGenerator: z must have shape [N, {self.latent_dim}], got {list(z.shape)}")
        return self.main(z).reshape(-1, *self.data_shape)


class MLPDiscriminator(nn.Module):
    """Samples ``[N, *data_shape]`` to logits [N]; built by :func:`mlp_gan`."""

    def __init__(self, data_shape: tuple[int, ...], main: nn.Sequential):
        super().__init__()
        self.data_shape, self.main = data_shape, main

    def forward(self, samples: Tensor) -> Tensor:
        if samples.dim() == 0 or samples.shape[1:] != self.data_shape:
            shape = ", ".join(map(str, ("N", *self.data_shape)))
            raise ValueError(f"MLPDiscriminator: samples must have shape [{shape}], got {list(samples.shape)}")
        return self.main(samples.flatten(1)).flatten()


def mlp_gan(
    data_shape: int | Sequence[int],
    latent_dim: int = 100,
    hidden_features: int = 50,
    *,
    generator_layers: int = 2,
    discriminator_layers: int = 3,
    output_activation: str = "tanh",
    copies: int = 1,
) -> tuple[MLPGenerator, MLPDiscriminator]:
    """Build the two networks of a GAN of multilayer perceptrons.

    Args:
        data_shape: shape of one sample, such as ``(1, 28, 28)`` or ``784``.
        latent_dim: length of the generator's input.
        hidden_features: units of every hidden layer.
        generator_layers: layers of the generator, its output included: 2 is one hidden layer.
        discriminator_layers: layers of the discriminator, likewise.
        output_activation: of the generator, ``"tanh"`` for samples in [-1, 1] or ``"linear"``.
        copies: independent pairs of networks held in one pair of modules (see :class:`StackedLinear`).
            Batches are then ``copies`` equal parts, the k-th for the k-th pair.

    Returns:
        ``(generator, discriminator)``. The generator maps z [N, latent_dim] to samples
        ``[N, *data_shape]``, the discriminator maps such samples to logits [N].

    The generator's hidden layers have ReLU, the discriminator's leaky ReLU with slope 0.2; weights and
    biases start as in ``nn.Linear``.

    Raises:
        ValueError: an empty shape, a count below 1, an unknown activation.
        TypeError: a size or count that is no integer.
    """
    shape = tuple(data_shape) if isinstance(data_shape, Iterable) else (data_shape,)
    for size in shape:
        check_integer("mlp_gan", "each size of data_shape", size)
    shape = tuple(map(int, shape))
    if not shape or min(shape) < 1:
        raise ValueError(f"mlp_gan: data_shape must have sizes of at least 1, got {data_shape}")
    check_counts("mlp_gan", latent_dim=latent_dim, hidden_features=hidden_features, generator_layers=generator_layers,
                 discriminator_layers=discriminator_layers, copies=copies)
    if output_activation not in OUTPUT_ACTIVATIONS:
        raise ValueError(
            f"mlp_gan: output_activation must be one of {', '.join(OUTPUT_ACTIVATIONS)}, got {output_activation!r}"
        )

    def perceptron(inputs: int, outputs: int, layers: int, activation: nn.Module) -> list[nn.Module]:
        widths = [inputs] + [hidden_features] * (layers - 1) + [outputs]
        modules: list[nn.Module] = []
        for fan_in, fan_out in zip(widths, widths[1:]):
            modules += [nn.Linear(fan_in, fan_out) if copies == 1 else StackedLinear(fan_in, fan_out, copies), activation]
        return modules[:-1]

    size = math.prod(shape)
    generator = perceptron(latent_dim, size, generator_layers, nn.ReLU())
    discriminator = perceptron(size, 1, discriminator_layers, nn.LeakyReLU(0.2))
    return (
        MLPGenerator(shape, latent_dim, nn.Sequential(*generator, OUTPUT_ACTIVATIONS[output_activation]())),
        MLPDiscriminator(shape, nn.Sequential(*discriminator)),
    )
