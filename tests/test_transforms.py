"""torch.func's transforms, forward-mode derivatives and batches of gradients: operators and fused networks run PyTorch's own operators there."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, linearize, vmap

import fastgan
from fastgan import _extension, ops

pytestmark = pytest.mark.filterwarnings(
    "ignore:fastgan runs .* in plain PyTorch:RuntimeWarning", "ignore::DeprecationWarning", "ignore::FutureWarning",
    "ignore:Attempted to insert a get_attr Node:UserWarning",
)


def numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


WEIGHT, ROWS = numbers(4, 3, 4, 4), torch.tensor([1, 4, 0])
OPERATORS = {
    "conv2d_act": (lambda x: ops.conv2d_act(x, WEIGHT, stride=2, padding=1), (2, 3, 8, 8)),
    "conv2d_bn_act": (lambda x: ops.conv2d_bn_act(x, WEIGHT, stride=2, padding=1), (2, 3, 8, 8)),
    "conv_transpose2d_act": (lambda x: ops.conv_transpose2d_act(x, WEIGHT, stride=2, padding=1), (2, 4, 4, 4)),
    "conv_transpose2d_bn_act": (lambda x: ops.conv_transpose2d_bn_act(x, WEIGHT, stride=2, padding=1), (2, 4, 4, 4)),
    "softmax_entropy": (lambda x: torch.stack(ops.softmax_entropy(x)), (3, 5)),
    "softmax_entropy_cross_entropy": (lambda x: torch.stack(ops.softmax_entropy_cross_entropy(x, ROWS)), (3, 5)),
    "batch_norm_act_noise": (ops.batch_norm_act_noise, (6, 3)),
}


@pytest.fixture(params=OPERATORS)
def operator(request):
    function, shape = OPERATORS[request.param]
    return function, numbers(*shape)


def test_grad_and_vmap(operator):
    function, x = operator
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(function(leaf).square().sum(), leaf)  # by the fused kernels
    torch.testing.assert_close(grad(lambda x: function(x).square().sum())(x), expected)
    many = torch.stack([x, 2 * x, x - 1])
    torch.testing.assert_close(vmap(function)(many), torch.stack([function(one) for one in many]))


def test_forward_mode(operator):
    function, x = operator
    tangent = x.flip(0).cos()
    expected = torch.autograd.functional.jvp(function, x, tangent)  # two backward passes
    torch.testing.assert_close(jvp(function, (x,), (tangent,)), expected)
    output, slope = linearize(function, x)
    torch.testing.assert_close((output, slope(tangent)), expected)
    with forward_ad.dual_level():
        torch.testing.assert_close(tuple(forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent)))), expected)


def test_many_gradients_at_once(operator):
    function, x = operator
    leaf = x.clone().requires_grad_()
    output = function(leaf)
    gradients = numbers(3, *output.shape)
    expected = torch.stack([torch.autograd.grad(output, leaf, one, retain_graph=True)[0] for one in gradients])
    (slopes,) = torch.autograd.grad(output, leaf, gradients, is_grads_batched=True, create_graph=True)
    torch.testing.assert_close(slopes, expected)
    (found,) = torch.autograd.grad(output, leaf, gradients, is_grads_batched=True)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.functional.hessian(lambda x: function(x).square().sum(), x, vectorize=True),
        torch.autograd.functional.hessian(lambda x: function(x).square().sum(), x),
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layers", [
    [nn.ConvTranspose2d(8, 16, 4, 1, 0), nn.BatchNorm2d(16), nn.ReLU(), nn.ConvTranspose2d(16, 16, 4, 2, 1), nn.LeakyReLU(0.1),
     nn.ConvTranspose2d(16, 3, 4, 2, 1), nn.Tanh()],
    [nn.Conv2d(8, 4, 3, padding=1), nn.BatchNorm2d(4), nn.LeakyReLU(0.2)],
    [nn.Flatten(), nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 5), nn.LeakyReLU(0.2)],
], ids=["stack", "layer", "linear"])  # fmt: skip
def test_many_gradients_at_once_of_a_fused_network(layers, training):
    plain = nn.Sequential(*copy.deepcopy(layers)).train(training)
    fused = fastgan.fuse(plain)
    x = numbers(4, 8, 1, 1).float().requires_grad_()
    expected, found = (
        torch.autograd.grad(y := network(x), [x, *network.parameters()], numbers(3, *y.shape).float(), is_grads_batched=True)
        for network in (plain, fused)
    )
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)


def test_a_class_of_probability_zero_has_no_gradient_there_either():
    logits = torch.tensor([[200.0, 0, 0], [200, 0, 1]])
    for function in (ops.softmax_entropy, lambda x: ops.softmax_entropy_cross_entropy(x, torch.tensor([0, 0]))):
        marginal = lambda x: function(x)[1]  # noqa: B023, E731
        torch.testing.assert_close(grad(marginal)(logits), torch.autograd.functional.jacobian(marginal, logits))
        torch.testing.assert_close(hessian(marginal)(logits), torch.autograd.functional.hessian(marginal, logits))


def test_hessian():
    logits = numbers(3, 4)
    function = lambda x: ops.softmax_entropy(x)[0]  # noqa: E731
    torch.testing.assert_close(hessian(function)(logits), torch.autograd.functional.hessian(function, logits))


def test_a_label_out_of_range_is_refused_there_too():
    with pytest.raises(IndexError):
        grad(lambda x: ops.softmax_entropy_cross_entropy(x, torch.tensor([5]))[2])(numbers(1, 5))


def test_said_once_and_an_error_if_strict(monkeypatch):
    monkeypatch.setattr(_extension, "_warned", set())
    function = grad(lambda x: ops.softmax_entropy(x)[0])
    with pytest.warns(RuntimeWarning, match="runs softmax_entropy in plain PyTorch: torch.func's transforms") as warned:
        function(numbers(2, 3)), function(numbers(2, 3))
    assert len(warned) == 1 and warned[0].filename == __file__
    monkeypatch.setenv("FASTGAN_STRICT", "1")
    with pytest.raises(RuntimeError, match="softmax_entropy: FASTGAN_STRICT=1"):
        function(numbers(2, 3))


def take_kernels_away(monkeypatch):
    monkeypatch.setattr(_extension, "_DEVICES", frozenset())
    monkeypatch.setattr(_extension, "_C", None)
    monkeypatch.setattr(_extension, "_missing_reason", "the kernels were taken away")
    monkeypatch.setattr(_extension, "_warned", set())


def test_the_warning_is_of_the_callers_line(operator, monkeypatch):
    function, x = operator
    monkeypatch.setattr(_extension, "_warned", set())
    with pytest.warns(RuntimeWarning, match="torch.func's transforms") as transformed:
        vmap(function)(torch.stack([x, x]))
    take_kernels_away(monkeypatch)
    with pytest.warns(RuntimeWarning, match="the kernels were taken away") as missing:
        function(x)
    assert [warning.filename for warning in (*transformed, *missing)] == [__file__] * 2


def test_explain_says_so(monkeypatch):
    said = []
    explained = vmap(lambda x: said.append(fastgan.explain("softmax_entropy", x)) or x)
    explained(numbers(1, 2, 3))
    assert "plain PyTorch" in said[0] and "torch.func's transforms" in said[0] and "FASTGAN_STRICT" not in said[0]
    monkeypatch.setenv("FASTGAN_STRICT", "1")
    explained(numbers(1, 2, 3))
    assert "FASTGAN_STRICT=1 makes this call an error" in said[1]
    assert "fused" in fastgan.explain("softmax_entropy", numbers(2, 3))


class Net(nn.Module):
    """With a forward that fuse traces."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 4, 2, 1)

    def forward(self, x):
        return torch.relu(self.conv(x))


NETWORKS = {
    "sequential": lambda: nn.Sequential(
        nn.Conv2d(3, 16, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(16, 16, 4, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten()
    ).eval(),
    "traced": Net,
    "perceptron": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(3 * 64, 1400), nn.ReLU(), nn.Linear(1400, 4)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_fused_networks(name):
    torch.manual_seed(0)
    plain = NETWORKS[name]()
    fused = fastgan.fuse(copy.deepcopy(plain))
    images = torch.randn(16, 3, 8, 8)
    state = {key: value.detach() for key, value in plain.state_dict().items()}
    names = {key for key, _ in plain.named_parameters()}

    def loss(parameters, image, network):
        buffers = {key: value for key, value in state.items() if key not in names}
        return functional_call(network, {**parameters, **buffers}, image[None]).square().sum()

    parameters = {key: state[key] for key in names}
    by_image = vmap(grad(loss), in_dims=(None, 0, None))
    torch.testing.assert_close(by_image(parameters, images, fused), by_image(parameters, images, plain))
    torch.testing.assert_close(jvp(fused, (images,), (images,)), jvp(plain, (images,), (images,)))
    torch.testing.assert_close(jacrev(fused)(images[:1]), jacrev(plain)(images[:1]))
    expected = plain(images)  # and afterwards the fused ones again
    torch.testing.assert_close(fused(images), expected, rtol=1e-4, atol=1e-5)


class OnCuda(torch.Tensor):
    """A tensor that says it is on a GPU."""

    device = torch.device("cuda", 0)


@pytest.mark.parametrize("name", ["sequential", "traced"])
def test_the_warning_of_a_fused_network_is_of_the_callers_line(name, monkeypatch):
    monkeypatch.setattr(_extension, "_DEVICES", frozenset({"cpu", "cuda"}))
    monkeypatch.setattr(_extension, "why_not_on_gpu", lambda device: "the GPU is too old")
    monkeypatch.setattr(_extension, "_warned", set())
    fused, images = fastgan.fuse(NETWORKS[name]()), torch.randn(2, 3, 8, 8).as_subclass(OnCuda)
    with pytest.warns(RuntimeWarning, match="runs the layers of a fused module in plain PyTorch: the GPU is too old") as warned:
        fused(images)
    assert [warning.filename for warning in warned] == [__file__]


def test_a_warning_waits_for_a_call_that_is_not_compiled(monkeypatch):
    torch._dynamo.reset()
    take_kernels_away(monkeypatch)
    logits = numbers(2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        compiled = torch.compile(lambda x: ops.softmax_entropy(x)[0], fullgraph=True, backend="eager")(logits)
    with pytest.warns(RuntimeWarning, match="the kernels were taken away"):
        torch.testing.assert_close(compiled, ops.softmax_entropy(logits)[0])


def test_compiled():
    torch._dynamo.reset()
    fused = fastgan.fuse(NETWORKS["sequential"]())
    images = torch.randn(4, 3, 8, 8)
    gradient = grad(lambda x: fused(x).square().sum())
    compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), gradient(images), rtol=1e-4, atol=1e-5)
