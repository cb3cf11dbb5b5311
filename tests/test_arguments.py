"""What is no tensor or no number is refused by name, by every public function alike; stand-ins for tensors are taken."""

import numpy
import pytest
import torch
from torch import fx, nn

import fastgan
from fastgan import losses, models, ops

CALLS = {
    "conv2d_act: input": lambda value: ops.conv2d_act(value, torch.ones(1, 1, 1, 1)),
    "conv2d_bn_act: input": lambda value: ops.conv2d_bn_act(input=value, weight=torch.ones(1, 1, 1, 1)),
    "conv_transpose2d_act: input": lambda value: ops.conv_transpose2d_act(value, torch.ones(1, 1, 1, 1)),
    "conv_transpose2d_bn_act: input": lambda value: ops.conv_transpose2d_bn_act(value, torch.ones(1, 1, 1, 1)),
    "softmax_entropy: logits": ops.softmax_entropy,
    "softmax_entropy_cross_entropy: logits": lambda value: ops.softmax_entropy_cross_entropy(value, torch.zeros(1).long()),
    "batch_norm_act_noise: input": ops.batch_norm_act_noise,
    "discriminator_loss: fake_logits": lambda value: losses.discriminator_loss(torch.ones(1), value),
    "generator_loss: fake_logits": losses.generator_loss,
    "gradient_penalty: real": lambda value: losses.gradient_penalty(nn.Identity(), value, torch.ones(1)),
    "r1_penalty: real": lambda value: losses.r1_penalty(nn.Identity(), value),
    "catgan_generator_loss: fake_logits": losses.catgan_generator_loss,
    "catgan_discriminator_loss: real_logits": lambda value: losses.catgan_discriminator_loss(value, torch.ones(1, 2)),
    "feature_matching_loss: real_features": lambda value: losses.feature_matching_loss(value, torch.ones(1, 2)),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("value", [[1.0, 2.0], numpy.ones((1, 2)), None], ids=["list", "array", "None"])
def test_what_is_no_tensor_is_refused_by_name(call, value):
    with pytest.raises(TypeError, match=f"^{call} must be a torch.Tensor, got {type(value).__name__}$"):
        CALLS[call](value)


def test_a_missing_operand_is_pythons_own_error():
    with pytest.raises(TypeError, match=r"softmax_entropy\(\) missing 1 required positional argument: 'logits'"):
        ops.softmax_entropy()


@pytest.mark.parametrize("function, name", [
    (models.dcgan, "image_size"), (models.dcgan, "base_channels"), (models.catgan, "image_size"),
    (models.catgan, "num_classes"), (lambda **counts: models.mlp_gan(4, **counts), "hidden_features"),
])  # fmt: skip
@pytest.mark.parametrize("value", ["64", 64.0, None])
def test_a_count_that_is_no_integer_is_refused_by_name(function, name, value):
    with pytest.raises(TypeError, match=f"^(dcgan|catgan|mlp_gan): {name} must be an integer, got {type(value).__name__}$"):
        function(**{name: value})


@pytest.mark.parametrize("function, name", [
    (models.catgan, "input_noise"), (models.catgan, "hidden_noise"), (fastgan.nn.GaussianNoise, "std"),
])  # fmt: skip
def test_noise_is_a_number_of_at_least_0(function, name):
    with pytest.raises(TypeError, match=f"^(catgan|GaussianNoise): {name} must be a number, got str$"):
        function(**{name: "a"})
    with pytest.raises(ValueError, match=f"^(catgan|GaussianNoise): {name} must be at least 0, got -1$"):
        function(**{name: -1})


def test_integers_of_numpy_are_counts():
    generator, _ = models.dcgan(numpy.int64(8), base_channels=numpy.int32(4))
    assert generator(torch.zeros(1, 100)).shape == (1, 3, 8, 8)


class CallsOperators(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 4, 2, 1), nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 2, 4, 2, 1)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = ops.conv2d_act(x, self.conv2.weight, self.conv2.bias, stride=2, padding=1)
        conditional, marginal = ops.softmax_entropy(x.flatten(1))
        return conditional - marginal


def test_torch_fx_keeps_a_call_of_an_operator():
    module = CallsOperators()
    graph = fx.symbolic_trace(module)
    assert [node.target for node in graph.graph.nodes if node.target in (ops.conv2d_act, ops.softmax_entropy)] == [
        ops.conv2d_act, ops.softmax_entropy,
    ]  # fmt: skip
    x = torch.randn(3, 4, 16, 16)
    torch.testing.assert_close(graph(x), module(x))


def test_fuse_takes_a_forward_that_calls_operators_itself():
    torch.manual_seed(0)
    module, x = CallsOperators(), torch.randn(3, 4, 16, 16)
    fused, report = fastgan.fuse(module, report=True)
    assert "conv1  fused with bn1 and relu" in str(report)
    want, got = module(x), fused(x)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, fused.parameters()), torch.autograd.grad(want, module.parameters())):
        torch.testing.assert_close(a, b)
