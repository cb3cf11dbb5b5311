"""What PyTorch does around an operator: hooks that keep saved tensors, gradients that are not there, other threads."""

import threading

import pytest
import torch
from torch import nn

import fastgan
from fastgan import _extension, ops
from fastgan.nn._runs import images_in_channels_last
from fastgan.nn.sync_batch_norm import SyncBatchNorm, own_statistics, synchronizing_group


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def one_convolution(transposed, norm, channels_last=False, dtype=torch.float32):
    layer = nn.ConvTranspose2d if transposed else nn.Conv2d
    network = nn.Sequential(layer(5, 4, 3, 2, 1), *([nn.BatchNorm2d(4)] if norm else []), nn.Tanh()).to(dtype)
    x = images(3, 5, 6, 7).to(dtype)
    return fastgan.fuse(network), x.contiguous(memory_format=torch.channels_last) if channels_last else x


class Entropies(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 5)

    def forward(self, x):
        return torch.stack(ops.softmax_entropy(self.layer(x)))


class Normalized(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(6, 5), nn.BatchNorm1d(5)

    def forward(self, x):
        norm = self.norm
        return ops.batch_norm_act_noise(self.layer(x), norm.weight, norm.bias, norm.running_mean, norm.running_var, training=True,
                                        activation="tanh")


def perceptron():
    widths = (40, 300, 300, 7)
    layers = [part for i, o in zip(widths, widths[1:]) for part in (nn.Linear(i, o), nn.BatchNorm1d(o), nn.LeakyReLU(0.2))]
    return fastgan.fuse(nn.Sequential(*layers)), images(64, 40)


CASES = {
    "generator": lambda: (fastgan.fuse(nn.Sequential(
        nn.ConvTranspose2d(16, 32, 4), nn.BatchNorm2d(32), nn.ReLU(), nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.BatchNorm2d(16),
        nn.ReLU(), nn.ConvTranspose2d(16, 3, 4, 2, 1), nn.Tanh())), images(4, 16, 1, 1)),
    "discriminator": lambda: (fastgan.fuse(nn.Sequential(
        nn.Conv2d(3, 16, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(16, 32, 4, 2, 1), nn.BatchNorm2d(32), nn.LeakyReLU(0.2),
        nn.Conv2d(32, 1, 4))), images(4, 3, 16, 16)),
    "convolution": lambda: one_convolution(False, False),
    "transposed": lambda: one_convolution(True, False, channels_last=True),
    "convolution and batch norm": lambda: one_convolution(False, True, dtype=torch.float64),
    "transposed and batch norm": lambda: one_convolution(True, True, channels_last=True),
    "bfloat16": lambda: one_convolution(True, True, dtype=torch.bfloat16),
    "perceptron": perceptron,
    "batch norm alone": lambda: (Normalized(), images(8, 6)),
    "entropies": lambda: (Entropies(), images(8, 6)),
}  # fmt: skip


def build(name):
    torch.manual_seed(0)
    network, x = CASES[name]()
    return network, x.requires_grad_()


def spread(tensor):
    """The same values with a stride of 2 in the last dimension and NaN between them."""
    if tensor.dim() == 0:
        return tensor
    wide = torch.zeros(*tensor.shape[:-1], 2 * tensor.shape[-1], dtype=tensor.dtype)
    if tensor.is_floating_point():
        wide.fill_(float("nan"))
    return wide[..., ::2].copy_(tensor)


@pytest.mark.parametrize("penalty", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_saved_tensors_may_come_back_with_other_strides(name, penalty):
    found = []
    for unpack in (lambda tensor: tensor, spread):
        network, x = build(name)
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.detach().clone(), unpack):
            output = network(x)
            loss = output.float().square().sum()
            if penalty:
                gradient, = torch.autograd.grad(loss, x, create_graph=True)
                loss = gradient.float().square().sum()
        found.append(torch.autograd.grad(loss, [x, *network.parameters()], allow_unused=True))
    for spread_out, dense in zip(*found):
        assert (spread_out is None) == (dense is None)
        if dense is not None:
            tolerance = 0.05 if dense.dtype == torch.bfloat16 else 1e-4
            assert (spread_out - dense).abs().max() <= tolerance * max(1, float(dense.abs().max()))


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        return tensor.clone()

    @staticmethod
    def backward(ctx, gradient):
        return None


@pytest.mark.parametrize("name", CASES)
def test_where_no_gradient_comes_none_leaves(name):
    """Zeros would make an optimizer with momentum or weight decay move the weights."""
    network, x = build(name)
    other = torch.zeros((), requires_grad=True)
    (NoGradient.apply(network(x)).float().sum() + other).backward()
    assert other.grad is not None
    assert [parameter.grad for parameter in (x, *network.parameters())] == [None] * (1 + len(list(network.parameters())))


def test_what_a_trainer_asks_of_fused_layers_it_asks_in_its_own_thread_only(monkeypatch):
    network, x = build("generator")
    bn = SyncBatchNorm(3)
    bn.process_group = "all"
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)
    inside, seen = threading.Barrier(2, timeout=60), {}

    def other():
        inside.wait()
        seen["contiguous"], seen["group"] = network(x).is_contiguous(), synchronizing_group(bn)
        inside.wait()

    thread = threading.Thread(target=other)
    thread.start()
    with images_in_channels_last(), own_statistics():
        inside.wait()
        inside.wait()
        assert not network(x).is_contiguous() or not _extension.has_kernels("cpu")
        assert synchronizing_group(bn) is None
    thread.join()
    assert seen["contiguous"] and seen["group"] is not None
    assert network(x).is_contiguous() and synchronizing_group(bn) is not None
