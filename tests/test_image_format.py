"""contiguous_images: contiguous() in either memory format, many of whose copies are fastgan's own."""

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

import fastgan
from fastgan import _extension

pytestmark = pytest.mark.skipif(not _extension.has_kernels("cpu"), reason="needs the compiled kernels")
FORMATS = [torch.contiguous_format, torch.channels_last]


def contiguous_images(x, memory_format):
    return torch.ops.fastgan.contiguous_images(x, memory_format is torch.channels_last)


def copies(call):
    """(what call returns, how often it ran fastgan's copy)"""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = call()
    return result, sum(event.name == "fastgan::convert_images" for event in profile.events())


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(5, 2, 7, 9), (1, 3, 1, 17), (3, 3, 32, 32), (2, 4, 3, 5), (0, 3, 4, 4)], ids=str)
def test_images_of_few_channels_are_copied_to_the_other_format(shape, dtype, memory_format):
    other = FORMATS[memory_format is torch.contiguous_format]
    x = (torch.randn(shape) * 1000).to(dtype).contiguous(memory_format=other)
    y, count = copies(lambda: contiguous_images(x, memory_format))
    assert count == 1 or x.numel() == 0
    assert y.is_contiguous(memory_format=memory_format) and y.stride() == x.contiguous(memory_format=memory_format).stride()
    assert torch.equal(x, y)
    assert contiguous_images(y, memory_format).data_ptr() == y.data_ptr()


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int32], ids=str)
@pytest.mark.parametrize("shape", [(5, 8, 4, 4), (3, 24, 2, 8), (1, 64, 16, 16), (0, 8, 4, 4)], ids=str)
def test_weights_are_copied_to_the_other_format(shape, dtype, memory_format):
    test_images_of_few_channels_are_copied_to_the_other_format(shape, dtype, memory_format)


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_everything_else_is_contiguous_as_ever(memory_format):
    images = torch.randn(3, 3, 8, 8)
    for x in (
        torch.randn(2, 1, 4, 4),
        torch.randn(2, 5, 4, 4).contiguous(memory_format=FORMATS[memory_format is torch.contiguous_format]),
        images.double(), images[:, :, ::2], images.transpose(2, 3), images.expand(2, 3, 3, 8, 8)[0], images[:, :1],
    ):  # fmt: skip
        y, count = copies(lambda: contiguous_images(x, memory_format))
        expected = x.contiguous(memory_format=memory_format)
        assert torch.equal(y, expected) and y.stride() == expected.stride()
        assert count == (x.shape[1] == 3 and x.element_size() == 4 and memory_format is torch.channels_last and x.is_contiguous())


@pytest.mark.parametrize("layer, converts", [
    (nn.Conv2d(16, 16, 4, 2, 1), True), (nn.Conv2d(16, 4, 4), True), (nn.Conv2d(16, 5, 4), False), (nn.Conv2d(16, 4, 4, dilation=2), False),
    (nn.Conv2d(16, 4, 3), False), (nn.Conv2d(16, 8, 4, 2, 1), False), (nn.ConvTranspose2d(16, 4, 4), False),
], ids=str)  # fmt: skip
def test_fused_layers_convert_images_for_loops_of_their_own_only(layer, converts):
    x = torch.randn(2, 16, 8, 8) if layer.dilation != (1, 1) or layer.padding != (0, 0) else torch.randn(2, 16, 4, 4)
    network = fastgan.fuse(nn.Sequential(layer, nn.ReLU()))
    y, count = copies(lambda: network(x))
    assert (count > 0) == converts
    assert torch.allclose(y, layer(x).relu(), atol=1e-5)


def test_gradients_pass_through_to_any_order():
    x = torch.randn(2, 3, 4, 4, dtype=torch.float32, requires_grad=True)
    y = contiguous_images(x, torch.channels_last)
    (first,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(first, 3 * x**2)
    torch.testing.assert_close(second, 6 * x)
    with torch.no_grad():
        assert not contiguous_images(x, torch.channels_last).requires_grad
    with torch.inference_mode():
        assert torch.equal(contiguous_images(x, torch.channels_last), x)


def test_fake_tensors_have_the_same_strides():
    with FakeTensorMode():
        y = contiguous_images(torch.empty(2, 3, 4, 5), torch.channels_last)
    assert y.shape == (2, 3, 4, 5) and y.stride() == (60, 1, 15, 3)


@pytest.mark.parametrize("channels", [3, 5, 16])
def test_the_gradient_of_contiguous_images_is_contiguous(channels):
    x = torch.randn(2, channels, 4, 4, requires_grad=True)
    upstream = torch.randn(2, channels, 4, 4).contiguous(memory_format=torch.channels_last)
    (gradient,) = torch.autograd.grad(contiguous_images(x, torch.channels_last), x, upstream)
    assert gradient.is_contiguous() and torch.equal(gradient, upstream)


def test_convert_images_says_what_it_takes():
    with pytest.raises(ValueError, match=r"convert_images: input must have shape \[N, C, H, W\], got \[2, 5\]"):
        torch.ops.fastgan.convert_images(torch.empty(2, 5), True)
