import numpy as np
import pytest
import torch
from torch import nn

from fastgan.losses import discriminator_loss
from fastgan.models import mlp_gan


@pytest.mark.parametrize("data_shape", [784, (1, 28, 28), [3, 4], 1])
@pytest.mark.parametrize("copies", [1, 3])
def test_shapes(data_shape, copies):
    shape = (data_shape,) if isinstance(data_shape, int) else tuple(data_shape)
    generator, discriminator = mlp_gan(data_shape, latent_dim=7, hidden_features=5, copies=copies)
    samples = generator(torch.rand(6, 7))
    assert samples.shape == (6, *shape) and samples.abs().max() <= 1
    assert discriminator(samples).shape == (6,)


def test_layer_counts_are_those_of_the_report():
    generator, discriminator = mlp_gan(784)
    layers = [[m for m in network.main if isinstance(m, nn.Linear)] for network in (generator, discriminator)]
    assert [len(found) for found in layers] == [2, 3]
    assert [found[0].out_features for found in layers] == [50, 50]
    _, deeper = mlp_gan(784, discriminator_layers=4)
    assert sum(isinstance(m, nn.Linear) for m in deeper.main) == 4


def test_linear_output_is_not_bounded():
    generator, _ = mlp_gan(3, latent_dim=2, output_activation="linear")
    assert generator(torch.full((1, 2), 1e4)).abs().max() > 1


def test_copies_are_independent_networks_on_the_parts_of_a_batch():
    torch.manual_seed(0)
    stacked, _ = mlp_gan(6, latent_dim=4, hidden_features=5, copies=3)
    z = torch.randn(12, 4)
    alone = []
    for k in range(3):
        single, _ = mlp_gan(6, latent_dim=4, hidden_features=5)
        single.load_state_dict({
            name: tensor[k].mT if name.endswith("weight") else tensor[k, 0] for name, tensor in stacked.state_dict().items()
        })
        alone.append(single(z[4 * k : 4 * k + 4]))
    torch.testing.assert_close(stacked(z), torch.cat(alone))
    stacked(z)[:4].sum().backward()
    assert stacked.main[0].weight.grad[0].abs().sum() > 0 and stacked.main[0].weight.grad[1:].abs().sum() == 0


def test_trains_under_autograd():
    generator, discriminator = mlp_gan((1, 4, 4), latent_dim=3)
    loss = discriminator_loss(discriminator(torch.rand(5, 1, 4, 4)), discriminator(generator(torch.rand(5, 3))))
    loss.backward()
    assert all(p.grad.isfinite().all() for network in (generator, discriminator) for p in network.parameters())


@pytest.mark.parametrize("settings, message", [
    (dict(data_shape=0), "data_shape must have sizes of at least 1, got 0"),
    (dict(data_shape=()), "data_shape must have sizes"),
    (dict(data_shape=4, latent_dim=0), "latent_dim must be at least 1, got 0"),
    (dict(data_shape=4, discriminator_layers=0), "discriminator_layers must be at least 1"),
    (dict(data_shape=4, output_activation="relu"), "output_activation must be one of tanh, linear, got 'relu'"),
])
def test_impossible_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        mlp_gan(**settings)


@pytest.mark.parametrize("data_shape", [None, "abc", 2.5, (2.5,)])
def test_a_data_shape_that_is_none_is_named(data_shape):
    with pytest.raises(TypeError, match="mlp_gan: each size of data_shape must be an integer, got"):
        mlp_gan(data_shape)


def test_integers_of_numpy_are_sizes():
    generator, _ = mlp_gan(np.int64(4))
    assert generator.data_shape == mlp_gan(np.array([4]))[0].data_shape == (4,) and type(generator.data_shape[0]) is int


def test_wrong_input_shapes_are_named():
    generator, discriminator = mlp_gan((1, 4, 4), latent_dim=3, copies=2)
    with pytest.raises(ValueError, match=r"z must have shape \[N, 3\], got \[2, 4\]"):
        generator(torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"samples must have shape \[N, 1, 4, 4\], got \[2, 16\]"):
        discriminator(torch.zeros(2, 16))
    with pytest.raises(ValueError, match="must divide into 2 equal parts, got 3"):
        generator(torch.zeros(3, 3))
