"""fuse() on networks that nobody here wrote: same numbers, same state_dict, nothing lost."""

import copy
import functools
import io
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

import fastgan
from fastgan.nn import ConvBNAct2d, ConvTransposeBNAct2d, _runs
from fastgan.nn.fuse import FusedSequential


class Generator(nn.Module):
    """The layout of PyTorch's own DCGAN example: everything in self.main."""

    def __init__(self, latent=16, width=8, channels=3):
        super().__init__()
        self.main = nn.Sequential(
            nn.ConvTranspose2d(latent, width * 4, 4, 1, 0, bias=False), nn.BatchNorm2d(width * 4), nn.ReLU(True),
            nn.ConvTranspose2d(width * 4, width * 2, 4, 2, 1, bias=False), nn.BatchNorm2d(width * 2), nn.ReLU(True),
            nn.ConvTranspose2d(width * 2, width, 4, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(True),
            nn.ConvTranspose2d(width, channels, 4, 2, 1, bias=False), nn.Tanh(),
        )  # fmt: skip

    def forward(self, z):
        return self.main(z)


class Discriminator(nn.Module):
    def __init__(self, width=8, channels=3):
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(channels, width, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(width, width * 2, 4, 2, 1, bias=False), nn.BatchNorm2d(width * 2), nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(width * 2, width * 4, 4, 2, 1, bias=False), nn.BatchNorm2d(width * 4), nn.LeakyReLU(0.2, True),
            nn.Conv2d(width * 4, 1, 4, 1, 0, bias=False),
        )  # fmt: skip

    def forward(self, x):
        return self.main(x).flatten()


def conv_bn_relu(**kwargs):
    return nn.Sequential(nn.Conv2d(3, 8, 4, 2, 1, **kwargs), nn.BatchNorm2d(8), nn.ReLU())


def is_fused(module):
    return any(isinstance(child, FusedSequential) for child in module.modules())


def fused_calls(module, x):
    """Names of the fastgan operators that a call of module runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        module(x)
    public = ("conv2d_act", "conv2d_bn_act", "conv_transpose2d_act", "conv_transpose2d_bn_act")
    return sorted(e.name.removeprefix("fastgan::") for e in profile.events() if e.name in [f"fastgan::{p}" for p in public])


def assert_same(plain, fused, x, modes=(True, False), rtol=1e-4, atol=1e-5):
    """Outputs, gradients and buffers of the two agree, in training and in evaluation mode, on the device of x."""
    plain.to(x.device), fused.to(x.device)
    for training in modes:
        plain.train(training), fused.train(training)
        results = []
        for module in (plain, fused):
            module.zero_grad()
            inputs = x.clone().requires_grad_()
            output = module(inputs)
            output.pow(2).sum().backward()
            results.append((output, inputs.grad, {name: p.grad for name, p in module.named_parameters()}))
        (y, gx, gp), (fy, fgx, fgp) = results
        torch.testing.assert_close(fy, y, rtol=rtol, atol=atol)
        assert fy.stride() == y.stride()
        torch.testing.assert_close(fgx, gx, rtol=rtol, atol=atol * (1 + gx.abs().max().item()))
        assert gp.keys() == fgp.keys()
        # Rounding goes by the largest gradient: that of a bias before batch norm is 0 but for PyTorch's rounding.
        scale = max((g.abs().max().item() for g in gp.values() if g is not None), default=0.0)
        for name in gp:
            if gp[name] is None:
                assert fgp[name] is None, name
            else:
                torch.testing.assert_close(fgp[name], gp[name], rtol=rtol, atol=atol * (1 + scale), msg=name)
    for (name, ours), (_, theirs) in zip(fused.named_buffers(), plain.named_buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, msg=name)


@pytest.mark.parametrize(
    "layers, converts",
    [
        (lambda: (nn.Conv2d(16, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 1), nn.Tanh()), False),
        (lambda: (nn.Conv2d(16, 16, 4, 2, 1, groups=2), nn.ReLU()), False),
        (lambda: (nn.ConvTranspose2d(16, 16, 4, 2, 1, output_padding=1), nn.ReLU()), False),
        (lambda: (nn.Conv2d(16, 12, 4, 2, 1), nn.ReLU()), False),
        (lambda: (nn.Conv2d(16, 16, 4, 2, 1, groups=2), nn.ReLU(), nn.Conv2d(16, 16, 4, 2, 1), nn.ReLU()), True),
        (lambda: (nn.Conv2d(16, 1, 8), nn.Sigmoid()), True),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_are_in_channels_last_where_a_loop_takes_no_other_format(monkeypatch, layers, converts, dtype):
    formats = []
    original = _runs.in_format
    monkeypatch.setattr(_runs, "in_format", lambda images, to: (formats.append(to), original(images, to))[1])
    plain = nn.Sequential(*layers()).to(dtype)
    fused = fastgan.fuse(copy.deepcopy(plain))
    assert_same(plain, fused, torch.randn(2, 16, 8, 8, dtype=dtype))
    assert (torch.channels_last in formats) == (converts and dtype == torch.float32)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_behind_one_channel_the_format_is_pytorchs(norm, inplace):
    norms = lambda channels: [nn.BatchNorm2d(channels)] if norm else []
    plain = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), *norms(16), nn.ReLU(inplace), nn.Conv2d(16, 1, 1), *norms(1), nn.ReLU(inplace),
        nn.ConvTranspose2d(1, 16, 4, 2, 1), nn.ReLU(inplace),
    )  # fmt: skip
    for end in (3 + norm, 5 + 2 * norm, len(plain)):  # behind the second convolution, its activation, and all
        part = plain[:end]
        x = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
        assert_same(part, fastgan.fuse(copy.deepcopy(part)), x)


def train(generator, discriminator, steps, device="cpu", seed=1):
    """DCGAN training as in PyTorch's example. Returns the losses."""
    generator.to(device), discriminator.to(device)
    optimizers = [torch.optim.Adam(m.parameters(), 2e-4, betas=(0.5, 0.999)) for m in (discriminator, generator)]
    noise = torch.Generator().manual_seed(seed)
    losses = []
    bce = nn.functional.binary_cross_entropy_with_logits
    for _ in range(steps):
        real = torch.randn(8, 3, 32, 32, generator=noise).tanh().to(device)
        fake = generator(torch.randn(8, 16, 1, 1, generator=noise).to(device))
        discriminator.zero_grad()
        on_real, on_fake = discriminator(real), discriminator(fake.detach())
        loss_d = bce(on_real, torch.ones_like(on_real)) + bce(on_fake, torch.zeros_like(on_fake))
        loss_d.backward()
        optimizers[0].step()
        generator.zero_grad()
        on_fake = discriminator(fake)
        loss_g = bce(on_fake, torch.ones_like(on_fake))
        loss_g.backward()
        optimizers[1].step()
        losses += [loss_d.item(), loss_g.item()]
    return losses


def networks(seed=0):
    torch.manual_seed(seed)
    return Generator(), Discriminator()


def test_fifty_training_steps_give_the_same_losses_and_exchangeable_state_dicts(device):
    plain = networks()
    fused = [fastgan.fuse(network) for network in networks()]
    plain_losses, fused_losses = train(*plain, 50, device), train(*fused, 50, device)
    # Rounding grows along a trajectory: tight at first, looser at the end.
    assert fused_losses[:10] == pytest.approx(plain_losses[:10], rel=1e-4)
    assert fused_losses == pytest.approx(plain_losses, rel=2e-2, abs=2e-2)
    for a, b in zip(plain, fused):
        assert list(a.state_dict()) == list(b.state_dict())
        assert [name for name, _ in a.named_parameters()] == [name for name, _ in b.named_parameters()]
        a.load_state_dict(b.state_dict())
        b.load_state_dict(a.state_dict())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_generator_and_discriminator_agree_in_both_modes(layout, device):
    generator, discriminator = networks()
    assert_same(generator, fastgan.fuse(copy.deepcopy(generator)), torch.randn(4, 16, 1, 1, device=device))
    discriminator = discriminator.to(memory_format=layout)
    x = torch.randn(4, 3, 32, 32, device=device).contiguous(memory_format=layout)
    assert_same(discriminator, fastgan.fuse(copy.deepcopy(discriminator)), x)


@pytest.mark.parametrize("kwargs", [
    dict(eps=1e-2), dict(momentum=0.9), dict(momentum=None), dict(affine=False), dict(track_running_stats=False),
    dict(affine=False, track_running_stats=False, momentum=None),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("bias", [True, False])
def test_every_kind_of_batch_norm(kwargs, bias, device):
    plain = nn.Sequential(nn.Conv2d(3, 8, 4, 2, 1, bias=bias), nn.BatchNorm2d(8, **kwargs), nn.LeakyReLU(0.3)).to(device)
    fused = fastgan.fuse(copy.deepcopy(plain))
    for _ in range(3):
        x = torch.randn(4, 3, 8, 8, device=device)
        plain(x), fused(x)
    assert_same(plain, fused, torch.randn(4, 3, 8, 8, device=device))


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU(True), nn.LeakyReLU(), nn.LeakyReLU(-0.1), nn.Tanh(), nn.Sigmoid(), nn.ELU()])
@pytest.mark.parametrize("bn", [True, False])
def test_every_activation(activation, bn, device):
    plain = nn.Sequential(nn.ConvTranspose2d(3, 8, 4, 2, 1), *([nn.BatchNorm2d(8)] if bn else []), activation)
    assert_same(plain, fastgan.fuse(copy.deepcopy(plain)), torch.randn(4, 3, 8, 8, device=device))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("conv", [lambda: nn.Conv2d(3, 16, 4, 2, 1), lambda: nn.Conv2d(3, 5, 3)], ids=["a run", "a layer"])
@pytest.mark.parametrize("bn", [True, False])
def test_what_leaves_leaky_relu_may_be_changed_in_place(conv, bn, layout, device):
    first = conv()
    norm = [nn.BatchNorm2d(first.out_channels)] if bn else []
    plain = nn.Sequential(first, *norm, nn.LeakyReLU(0.2), nn.ELU(inplace=True))
    x = torch.randn(4, 3, 8, 8, device=device).contiguous(memory_format=layout)
    assert_same(plain, fastgan.fuse(copy.deepcopy(plain)), x)


@pytest.mark.parametrize("set_to", [1, (1,), [1, 1]], ids=str)
def test_attributes_of_convolutions_may_be_set_as_pytorch_takes_them(set_to, device):
    plain = nn.Sequential(nn.Conv2d(3, 16, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(16, 16, 4, 2, 1), nn.Conv2d(16, 16, 4, 2, 1))
    plain[0].padding = set_to  # nn.ConvTranspose2d takes a tuple alone
    for conv in (plain[0], plain[2]):
        conv.stride = conv.dilation = set_to
    plain[2].output_padding = 0
    assert_same(plain, fastgan.fuse(copy.deepcopy(plain)), torch.randn(4, 3, 8, 8, device=device))


def test_nested_shared_and_mixed_children():
    shared = nn.Conv2d(8, 8, 3, padding=1)
    plain = nn.Sequential(
        nn.Sequential(conv_bn_relu(), nn.Dropout(0.0)), shared, nn.ReLU(), shared, nn.BatchNorm2d(8),
        nn.Upsample(scale_factor=2), nn.Conv2d(8, 4, 3, padding=1, padding_mode="reflect"), nn.ReLU(),
        nn.Conv2d(4, 4, (1, 3), padding="same"), nn.LeakyReLU(0.1), nn.Flatten(), nn.Linear(256, 2),
    )  # fmt: skip
    assert_same(plain, fastgan.fuse(copy.deepcopy(plain)), torch.randn(4, 3, 8, 8))


def test_view_in_somebodys_child_still_works():
    class View(nn.Module):
        def forward(self, x):
            return x.view(x.size(0), -1)

    plain = nn.Sequential(*conv_bn_relu(), View(), nn.Linear(128, 2))
    assert_same(plain, fastgan.fuse(copy.deepcopy(plain)), torch.randn(4, 3, 8, 8))


def test_hooked_layers_are_left_alone_and_their_hooks_run():
    fused = fastgan.fuse(conv_bn_relu())
    x = torch.randn(2, 3, 8, 8)
    assert fused_calls(fused, x) == ["conv2d_bn_act"]
    seen = []
    handle = fused[1].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    assert fused_calls(fused, x) == ["conv2d_act"] and seen == [(2, 8, 4, 4)]
    handle.remove()
    assert fused_calls(fused, x) == ["conv2d_bn_act"]
    everywhere = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(type(module)))
    fused(x)
    everywhere.remove()
    assert nn.BatchNorm2d in seen and nn.Conv2d in seen


def test_parametrized_and_subclassed_layers_are_left_alone():
    class Scaled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    torch.manual_seed(0)
    plain = nn.Sequential(spectral_norm(nn.Conv2d(3, 8, 4, 2, 1)), nn.ReLU(), Scaled(8, 8, 3), nn.ReLU())
    fused = fastgan.fuse(copy.deepcopy(plain))
    assert_same(plain, fused, torch.randn(4, 3, 12, 12), modes=(False,))
    assert fused_calls(fused, torch.randn(4, 3, 12, 12)) == []


def test_frozen_parameters_get_no_gradient(device):
    plain = networks()[1]
    for parameter in list(plain.parameters())[::2]:
        parameter.requires_grad_(False)
    assert_same(plain, fastgan.fuse(copy.deepcopy(plain)), torch.randn(4, 3, 32, 32, device=device))


def test_not_in_place_leaves_the_module_as_it_was_and_shares_its_parameters():
    plain = Generator()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)  # built before fusing
    fused = fastgan.fuse(plain)
    assert is_fused(fused) and not is_fused(plain) and fused is not plain
    assert all(a is b for a, b in zip(plain.parameters(), fused.parameters(), strict=True))
    assert all(a is b for a, b in zip(plain.buffers(), fused.buffers(), strict=True))
    before = [p.clone() for p in fused.parameters()]
    fused(torch.randn(4, 16, 1, 1)).sum().backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, fused.parameters()))


@pytest.mark.parametrize("change", [
    lambda conv: nn.utils.weight_norm(conv), lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
], ids=["weight_norm", "prune"])  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_not_in_place_takes_weights_that_hooks_compute(change):
    plain = networks()[1].eval()
    change(plain.main[2])
    fused = fastgan.fuse(plain)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(1.5)
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-5)


def test_in_place_returns_the_module_itself_and_twice_is_once():
    plain = Generator()
    fused = fastgan.fuse(plain, inplace=True)
    assert fused is plain and is_fused(plain)
    assert type(fastgan.fuse(fused).main) is type(fused.main)


def test_deep_copy_pickle_and_save_keep_it_fused():
    fused = fastgan.fuse(networks()[1])
    x = torch.randn(2, 3, 32, 32)
    expected = fused.eval()(x)
    for clone in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert is_fused(clone)
        torch.testing.assert_close(clone(x), expected, rtol=0, atol=0)
    buffer = io.BytesIO()
    torch.save(fused, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.load(buffer, weights_only=False)(x), expected, rtol=0, atol=0)


def test_functional_call_uses_the_given_parameters():
    plain = conv_bn_relu()
    fused = fastgan.fuse(copy.deepcopy(plain))
    other = {name: value + 0.1 for name, value in plain.named_parameters()}
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(
        torch.func.functional_call(fused, other, x), torch.func.functional_call(plain, other, x), rtol=1e-4, atol=1e-5
    )


def test_compiles_without_graph_breaks(device):
    torch._dynamo.reset()
    plain = networks()[1]
    fused = fastgan.fuse(copy.deepcopy(plain))
    fused.compile(fullgraph=True, backend="aot_eager")
    assert_same(plain, fused, torch.randn(4, 3, 32, 32, device=device))


@pytest.mark.parametrize("width", [8, 16])  # layer by layer, and as one operator
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_is_traced_or_exported_needs_no_fastgan(width, monkeypatch):
    fused, x = fastgan.fuse(Discriminator(width)).eval(), torch.randn(2, 3, 32, 32)
    traced = torch.jit.trace(fused, x)
    assert "fastgan::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), fused(x), rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    assert fused_calls(fused, x) == []


def test_gradient_penalty_through_a_fused_discriminator():
    plain = networks()[1].double()
    fused = fastgan.fuse(copy.deepcopy(plain))
    penalties = []
    for network in (plain, fused):
        x = torch.linspace(-1, 1, 4 * 3 * 32 * 32, dtype=torch.float64).sin().reshape(4, 3, 32, 32).requires_grad_()
        (gradient,) = torch.autograd.grad(network(x).sum(), x, create_graph=True)
        penalty = (gradient.flatten(1).norm(dim=1) - 1).pow(2).mean()
        penalties.append((penalty, torch.autograd.grad(penalty, list(network.parameters()))))
    torch.testing.assert_close(penalties[1], penalties[0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("bn", [False, True])
@pytest.mark.parametrize("kernel, c_in, c_out", [(4, 3, 32), (4, 32, 16), (3, 3, 10), (5, 33, 8), (4, 1, 16)])
def test_the_gradient_of_a_contiguous_input_is_contiguous(device, kernel, c_in, c_out, bn, create_graph):
    torch.manual_seed(0)
    norm = [nn.BatchNorm2d(c_out)] if bn else []
    net = nn.Sequential(nn.Conv2d(c_in, c_out, kernel, 2, 1), *norm, nn.LeakyReLU(0.2), nn.Conv2d(c_out, 16, 4, 2, 1)).to(device)
    x = torch.randn(4, c_in, 16, 16, device=device, requires_grad=True)
    for images, low in itertools.product((x, 2 * x), (False, True) if device.type == "cuda" else (False,)):
        gradients = []
        for network in (net, fastgan.fuse(net)):
            with torch.autocast(device.type, torch.bfloat16, enabled=low):
                loss = network(images).float().square().sum()
            gradients += torch.autograd.grad(loss, images, create_graph=create_graph)
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=(0.05 if low else 1e-6) * gradients[0].detach().abs().max().item())
        gradients[1].view(4, -1)  # as gradient penalties do


@pytest.mark.parametrize("kernel, logit", [(4, -200.0), (4, -100.0), (4, -50.0), (3, -200.0), (3, 200.0)])
def test_a_saturated_sigmoid_gives_pytorchs_loss(kernel, logit):
    plain = nn.Sequential(nn.Conv2d(16, 1, kernel), nn.Sigmoid())
    nn.init.zeros_(plain[0].weight)
    nn.init.constant_(plain[0].bias, logit)
    x = torch.randn(4, 16, 4, 4)
    for target in (0.0, 1.0):
        losses = [F.binary_cross_entropy(y := network(x), torch.full_like(y, target)) for network in (plain, fastgan.fuse(plain))]
        torch.testing.assert_close(losses[1], losses[0])  # PyTorch cuts it off at 100


@pytest.mark.parametrize("layer, size", [(lambda: nn.Conv2d(1, 64, 4, 2, 1), 4), (lambda: nn.Conv2d(3, 3, 1), 5),
                                         (lambda: nn.ConvTranspose2d(16, 1, 4, 2, 1), 4)])  # fmt: skip
@pytest.mark.parametrize("weights", [torch.channels_last, torch.contiguous_format])
def test_the_output_has_the_layout_that_plain_layers_give_it(layer, size, weights):
    plain = nn.Sequential(layer(), nn.ReLU()).to(memory_format=weights)
    x = torch.randn(16, plain[0].in_channels, size, size)
    y, expected = fastgan.fuse(plain)(x), plain(x)
    assert y.is_contiguous() == expected.is_contiguous()
    assert y.is_contiguous(memory_format=torch.channels_last) == expected.is_contiguous(memory_format=torch.channels_last)


def test_a_refused_input_changes_no_running_statistic():
    fused = fastgan.fuse(conv_bn_relu())
    with pytest.raises((ValueError, RuntimeError)):
        fused(torch.randn(1, 3, 2, 2))  # one value a channel
    assert fused[1].num_batches_tracked == 0 and (fused[1].running_mean == 0).all()


def test_sequential_subclass_keeps_its_class_and_own_forward_is_respected():
    class Block(nn.Sequential):
        pass

    class Doubled(nn.Sequential):
        def forward(self, x):
            return 2 * super().forward(x)

    fused = fastgan.fuse(nn.Sequential(Block(*conv_bn_relu()), Doubled(nn.Conv2d(8, 8, 1), nn.ReLU())))
    assert isinstance(fused[0], Block) and is_fused(fused[0])
    assert type(fused[1]) is Doubled


def test_only_modules_can_be_fused():
    with pytest.raises(TypeError, match="fuse: module must be a torch.nn.Module, got function"):
        fastgan.fuse(lambda x: x)


@pytest.mark.parametrize("cls, plain_conv", [(ConvBNAct2d, nn.Conv2d), (ConvTransposeBNAct2d, nn.ConvTranspose2d)])
def test_modules_equal_the_plain_layers(cls, plain_conv):
    for momentum in (0.1, None):
        layer = cls(3, 8, 4, 2, 1, momentum=momentum, activation="leaky_relu", negative_slope=0.1)
        plain = nn.Sequential(plain_conv(3, 8, 4, 2, 1, bias=False), nn.BatchNorm2d(8, momentum=momentum), nn.LeakyReLU(0.1))
        plain.load_state_dict({k.replace("conv.", "0.").replace("bn.", "1."): v for k, v in layer.state_dict().items()})
        for _ in range(2):
            x = torch.randn(4, 3, 8, 8)
            torch.testing.assert_close(layer(x), plain(x), rtol=1e-4, atol=1e-5)
        layer.eval(), plain.eval()
        torch.testing.assert_close(layer(x), plain(x), rtol=1e-4, atol=1e-5)
        assert copy.deepcopy(layer).bn.num_batches_tracked == 2


def test_module_refuses_an_unknown_activation():
    with pytest.raises(ValueError, match="ConvBNAct2d: activation must be one of 'relu'.*got 'swish'"):
        ConvBNAct2d(3, 8, 4, activation="swish")


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("network", ["stack", "layers", "perceptron", "norm"])
def test_checkpointed_batches_are_counted_like_pytorchs(network, momentum):
    bn, bn1d = functools.partial(nn.BatchNorm2d, momentum=momentum), functools.partial(nn.BatchNorm1d, momentum=momentum)
    convolutions = (3, 16, 4, 2, 1), (16, 32, 4, 2, 1)
    if network == "layers":
        convolutions = (3, 16, 3), (16, 32, 3)
    if network in ("stack", "layers"):
        layers = [layer for shape in convolutions for layer in (nn.Conv2d(*shape), bn(shape[1]), nn.ReLU())]
    else:
        layers = [nn.Flatten(), *([nn.Linear(192, 192)] * (network == "perceptron")), bn1d(192), nn.ReLU()]
    plain = nn.Sequential(*layers)
    fused = fastgan.fuse(copy.deepcopy(plain))
    for _ in range(3):
        x = torch.randn(200, 3, 8, 8).requires_grad_()
        for net in (plain, fused):
            checkpoint(net, x, use_reentrant=False).square().mean().backward()
    for (name, ours), theirs in zip(fused.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)
    assert plain[-2].num_batches_tracked == 6
