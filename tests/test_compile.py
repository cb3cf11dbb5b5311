"""torch.compile without graph breaks: networks, losses and whole training steps, against the same uncompiled."""

import copy

import pytest
import torch
from fuse_models import FunctionalDiscriminator, FunctionalGenerator
from torch import nn
from torch._inductor.utils import fresh_cache

import fastgan
from fastgan.losses import (
    DISCRIMINATOR_LOSSES, GENERATOR_LOSSES, catgan_discriminator_loss, catgan_generator_loss, discriminator_loss,
    feature_matching_loss, generator_loss,
)  # fmt: skip
from fastgan.models import catgan, dcgan


@pytest.fixture(autouse=True)
def forget_what_other_tests_compiled():
    torch._dynamo.reset()
    with fresh_cache():  # else code compiled before a fake kernel was changed comes back
        yield
    torch._dynamo.reset()


def compiled(function, backend="aot_eager"):
    """aot_eager traces forward and backward as inductor does, and costs no C++ compiler."""
    return torch.compile(function, fullgraph=True, backend=backend)


def train(generator, discriminator, latent, shape, wrap, steps=3):
    """Losses of a GAN's training steps, both losses from networks to scalar inside `wrap`."""
    optimizers = [torch.optim.Adam(n.parameters(), 1e-3, betas=(0.5, 0.999)) for n in (discriminator, generator)]

    def loss_of_discriminator(real, z):
        return discriminator_loss(discriminator(real), discriminator(generator(z).detach()))

    def loss_of_generator(z):
        return generator_loss(discriminator(generator(z)))

    loss_of_discriminator, loss_of_generator = wrap(loss_of_discriminator), wrap(loss_of_generator)
    torch.manual_seed(1)
    losses = []
    for _ in range(steps):
        real, z = torch.randn(4, *shape), torch.randn(4, latent)
        for optimizer, loss, inputs in (
            (optimizers[0], loss_of_discriminator, (real, z)), (optimizers[1], loss_of_generator, (z,))
        ):  # fmt: skip
            for other in optimizers:
                other.zero_grad()
            value = loss(*inputs)
            value.backward()
            optimizer.step()
            losses.append(value.item())
    return losses


def networks(style):
    torch.manual_seed(0)
    if style == "functional":
        return FunctionalGenerator(16), FunctionalDiscriminator(16), 16, (3, 32, 32)
    return *dcgan(16, 3, latent_dim=8, base_channels=16), 8, (3, 16, 16)


@pytest.mark.parametrize("style, backend", [("dcgan", "aot_eager"), ("functional", "aot_eager"), ("dcgan", "inductor")])
def test_a_compiled_training_step_gives_the_same_losses(style, backend):
    generator, discriminator, latent, shape = networks(style)
    results = []
    for wrap in (lambda function: function, lambda function: compiled(function, backend)):
        pair = [fastgan.fuse(copy.deepcopy(network)) for network in (generator, discriminator)]
        results.append((train(*pair, latent, shape, wrap), pair))
    (losses, plain), (ours, other) = results
    assert ours == pytest.approx(losses, rel=1e-4)
    for a, b in zip(plain, other):
        for (name, x), (_, y) in zip(a.named_buffers(), b.named_buffers(), strict=True):
            torch.testing.assert_close(y, x, rtol=1e-3, atol=1e-4, msg=name)


def test_compiled_networks_still_run_as_one_operator():
    discriminator = fastgan.fuse(networks("dcgan")[1])
    nodes = []

    def backend(graph, inputs):
        nodes.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch.compile(discriminator, fullgraph=True, backend=backend)(torch.randn(4, 3, 16, 16))
    assert [name for name in nodes if "fastgan" in name] == ["fastgan.conv_stack"]


@pytest.mark.parametrize("architecture, size", [("conv", 16), ("mlp", 8)])
def test_catgan_networks_and_losses_compile(architecture, size):
    torch.manual_seed(0)
    generator, classifier = catgan(
        size, 1, 3, 6, architecture, base_channels=16, input_noise=0.0, hidden_noise=0.0
    )  # noise is drawn in another order in a compiled graph
    labels = torch.tensor([0, 2, 1, -100])
    results = []
    for wrap in (lambda function: function, compiled):
        g, c = (fastgan.fuse(copy.deepcopy(network)) for network in (generator, classifier))

        def step(real, z, g=g, c=c):
            logits, fake = c(real), g(z)
            return catgan_discriminator_loss(logits, c(fake), logits, labels) + catgan_generator_loss(c(fake))

        torch.manual_seed(1)
        loss = wrap(step)(torch.randn(4, 1, size, size), torch.randn(4, 6))
        results.append([loss, *torch.autograd.grad(loss, [*g.parameters(), *c.parameters()])])
    scale = max(gradient.abs().max().item() for gradient in results[0])
    for plain, ours in zip(*results):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-5 * scale)


def test_every_loss_compiles():
    real, fake = torch.randn(6), torch.randn(6)
    for kind in DISCRIMINATOR_LOSSES:
        smoothing = 0.1 if kind == "minimax" else 0.0

        def loss(real, fake, kind=kind, smoothing=smoothing):
            return discriminator_loss(real, fake, kind, label_smoothing=smoothing)

        torch.testing.assert_close(compiled(loss)(real, fake), loss(real, fake))
    for kind in GENERATOR_LOSSES:
        torch.testing.assert_close(
            compiled(lambda fake, kind=kind: generator_loss(fake, kind))(fake), generator_loss(fake, kind)
        )
    features = torch.randn(2, 5, 4)
    torch.testing.assert_close(compiled(feature_matching_loss)(*features), feature_matching_loss(*features))


def test_a_mode_that_was_not_traced_runs_the_plain_forward():
    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x, shift=None):
            y = torch.relu(self.conv(x))
            return y if shift is None else y + shift

    plain = Optional()
    fused = fastgan.fuse(copy.deepcopy(plain))
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(compiled(fused)(x, torch.ones(1)), plain(x, torch.ones(1)))
    torch.testing.assert_close(compiled(fused)(x), plain(x))
