import re

import pytest
import torch
from torch import nn

from fastgan.models.dcgan import dcgan

SIZES = [4, 8, 16, 28, 32, 48, 64, 128, 256]


def build(image_size, channels=3):
    return dcgan(image_size, channels, latent_dim=10, base_channels=2)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", SIZES)
def test_shapes_for_every_size(size, channels):
    generator, discriminator = build(size, channels)
    z = torch.randn(3, 10)
    images = generator(z)
    assert images.shape == (3, channels, size, size)
    assert images.abs().max() <= 1
    assert discriminator(images).shape == (3,)
    generator.eval()
    torch.testing.assert_close(generator(z[:, :, None, None]), generator(z))


@pytest.mark.parametrize("size", SIZES)
def test_guideline_1_only_strided_convolutions_resize(size):
    for network, convolution in zip(build(size), (nn.ConvTranspose2d, nn.Conv2d)):
        layers = [m for m in network.main if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
        assert all(type(m) is convolution for m in layers)
        # The 1x1 end is a full-size kernel; every other layer is kernel 4, stride 2, padding 1.
        inner = layers[1:] if convolution is nn.ConvTranspose2d else layers[:-1]
        assert all((m.kernel_size, m.stride, m.padding) == ((4, 4), (2, 2), (1, 1)) for m in inner)
        assert not any(re.search("Pool|Upsample", type(m).__name__) for m in network.modules())


@pytest.mark.parametrize("size", SIZES)
def test_guideline_2_batch_norm_everywhere_but_generator_output_and_discriminator_input(size):
    generator, discriminator = build(size)
    kinds = [type(m) for m in generator.main]
    convolutions = [i for i, kind in enumerate(kinds) if kind is nn.ConvTranspose2d]
    assert all(kinds[i + 1] is nn.BatchNorm2d for i in convolutions[:-1])
    assert kinds[convolutions[-1] + 1 :] == [nn.Tanh]
    kinds = [type(m) for m in discriminator.main]
    convolutions = [i for i, kind in enumerate(kinds) if kind is nn.Conv2d]
    assert all(kinds[i + 1] is nn.BatchNorm2d for i in convolutions[1:-1])
    assert nn.BatchNorm2d not in kinds[:2]


@pytest.mark.parametrize("size", SIZES)
def test_guideline_3_no_fully_connected_layer(size):
    for network in build(size):
        assert not any(isinstance(m, nn.Linear) for m in network.modules())


@pytest.mark.parametrize("size", SIZES)
def test_guidelines_4_and_5_relu_and_tanh_in_the_generator_leaky_relu_in_the_discriminator(size):
    generator, discriminator = build(size)
    activations = [m for m in generator.main if not hasattr(m, "weight")]
    assert all(isinstance(m, nn.ReLU) for m in activations[:-1])
    assert isinstance(activations[-1], nn.Tanh)
    activations = [m for m in discriminator.main if not hasattr(m, "weight")]
    assert all(isinstance(m, nn.LeakyReLU) and m.negative_slope == 0.2 for m in activations)


def test_weights_are_drawn_as_in_the_paper():
    torch.manual_seed(0)
    for network in dcgan(64, 3, base_channels=32):
        for module in network.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and module.weight.numel() > 10_000:
                assert module.weight.mean().abs() < 0.001
                assert module.weight.std().item() == pytest.approx(0.02, rel=0.03)
            if isinstance(module, nn.BatchNorm2d):
                assert module.weight.mean().item() == pytest.approx(1, abs=0.01)
                assert module.weight.std().item() == pytest.approx(0.02, rel=0.4)
                assert not module.bias.any()


def test_default_is_the_paper_s_64_pixel_network():
    generator, discriminator = dcgan()
    widths = [m.out_channels for m in generator.main if isinstance(m, nn.ConvTranspose2d)]
    assert widths == [512, 256, 128, 64, 3]
    widths = [m.out_channels for m in discriminator.main if isinstance(m, nn.Conv2d)]
    assert widths == [64, 128, 256, 512, 1]


@pytest.mark.parametrize(
    "size, near", [(30, "28 and 32"), (50, "48 and 64"), (100, "64 and 128"), (3, "4"), (0, "4"), (-8, "4")]
)
def test_impossible_size_names_the_near_ones(size, near):
    with pytest.raises(ValueError, match=rf"image_size must be .*got {size}; the nearest that work: {near}$"):
        dcgan(size)


def test_counts_below_one_are_refused():
    with pytest.raises(ValueError, match="dcgan: latent_dim must be at least 1, got 0"):
        dcgan(32, latent_dim=0)


def test_wrong_inputs_are_refused_with_the_shape_that_came():
    generator, discriminator = build(32, 1)
    with pytest.raises(ValueError, match=r"z must have shape \[N, 10\] or \[N, 10, 1, 1\], got \[4, 11\]"):
        generator(torch.zeros(4, 11))
    with pytest.raises(ValueError, match=r"images must have shape \[N, 1, 32, 32\], got \[4, 3, 32, 32\]"):
        discriminator(torch.zeros(4, 3, 32, 32))
