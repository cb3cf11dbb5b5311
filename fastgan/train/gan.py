"""Training of the GAN of multilayer perceptrons: one network a class, all of them at once."""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastgan.data import Batch, Batches, ClassBatches, ImageDataset
from fastgan.losses import fake_loss, real_loss
from fastgan.models.gan import OUTPUT_ACTIVATIONS, mlp_gan
from fastgan.train.config import AdversarialConfig, option
from fastgan.train.trainer import Objective, mean_probability

CLASSES = 10


@dataclasses.dataclass(kw_only=True)
class GANConfig(AdversarialConfig):
    """Train a GAN of multilayer perceptrons on one digit, or ten of them, one on each digit, side by side.

    The grid of samples has a row of 16 for each of the ten, or shows 4 x 4 of one digit.
    """

    family: ClassVar[str] = "gan"
    latent_distribution: ClassVar[str] = "uniform"

    image_size: int = option(28, "height and width of the images in pixels", minimum=1)
    digit: int | None = option(None, "digit to learn; default: all ten, each with its own GAN",
                               choices=tuple(range(CLASSES)))
    epochs: int = option(100, "passes over the training images", minimum=1, may_change=True)
    batch_size: int = option(50, "images per class in a batch", minimum=1)
    learning_rate: float = option(1e-3, "Adam's step size, of both networks", minimum=0)
    hidden_features: int = option(50, "units of every hidden layer", minimum=1)
    generator_layers: int = option(2, "layers of the generator, its output included", minimum=1)
    discriminator_layers: int = option(3, "layers of the discriminator, its output included", minimum=1)
    output_activation: str = option("tanh", "of the generator", choices=tuple(OUTPUT_ACTIVATIONS))
    log_every: int = option(100, "steps between two lines of metrics.jsonl", minimum=1, may_change=True)
    checkpoint_every: int | None = option(1000, "steps between two checkpoints", minimum=1, may_change=True)
    output: str = option("runs/gan", "folder the results are written to", may_change=True)

    @property
    def classes(self) -> tuple[int, ...]:
        """The labels learnt, a GAN each."""
        return tuple(range(CLASSES)) if self.digit is None else (self.digit,)

    @property
    def side_by_side(self) -> int:
        return len(self.classes)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the grid of samples."""
        return (CLASSES, 16) if self.digit is None else (4, 4)

    def latent(self, count: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """``count`` inputs of the generator network, [count, latent_dim] from U(-1, 1)."""
        device = self.torch_device if generator is None else generator.device
        return torch.empty(count, self.latent_dim, device=device).uniform_(-1, 1, generator=generator)

    def batches(self, dataset: ImageDataset) -> Batches:
        return ClassBatches(dataset, self.batch_size, self.seed, self.classes, self.torch_device)

    def build(self, dataset: ImageDataset) -> tuple[nn.Module, nn.Module, Objective]:
        generator, discriminator = mlp_gan(
            self.image_shape_of(dataset), self.latent_dim, self.hidden_features,
            generator_layers=self.generator_layers, discriminator_layers=self.discriminator_layers,
            output_activation=self.output_activation, copies=self.side_by_side,
        )
        return generator, discriminator, GANObjective(self.side_by_side, self.generator_loss, **self.discriminator_terms)

    def build_generator(self) -> nn.Module:
        return mlp_gan(
            self.image_shape, self.latent_dim, self.hidden_features, generator_layers=self.generator_layers,
            output_activation=self.output_activation, copies=self.side_by_side,
        )[0]


class GANObjective(Objective):
    """The adversarial losses, with real and generated samples in one pass of the discriminator: it has no batch norm, so that
    its results are those of two passes, and networks this small take most of their time by the call.

    Args:
        copies: GANs trained side by side, as for :func:`fastgan.models.mlp_gan`.
        kind, terms: as for :class:`Objective`.
    """

    def __init__(self, copies: int, kind: str, **terms: float):
        super().__init__(kind, **terms)
        self.copies = copies

    def discriminator_losses(
        self, discriminator: nn.Module, batch: Batch, fake: Tensor
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        if self.gradient_penalty or self.r1:
            yield from super().discriminator_losses(discriminator, batch, fake)
            return
        both = torch.stack([images.unflatten(0, (self.copies, -1)) for images in (batch.images, fake)], 1)
        real_logits, fake_logits = discriminator(both.flatten(0, 2)).unflatten(0, (self.copies, 2, -1)).unbind(1)
        loss = real_loss(real_logits, self.discriminator_kind, label_smoothing=self.label_smoothing)
        loss = loss + fake_loss(fake_logits, self.discriminator_kind)
        yield loss, {"d_real": mean_probability(real_logits), "d_fake": mean_probability(fake_logits)}
