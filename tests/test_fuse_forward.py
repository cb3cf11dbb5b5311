"""fuse() on modules with a forward of their own: same numbers in every mode, nothing frozen, an honest report."""

import contextlib
import copy
import cProfile
import functools
import gc
import inspect
import io
import pickle
import pstats
import random
import re
import sys
import threading
import time
import types
from pathlib import Path

import numpy
import pytest
import torch
from fuse_models import (
    DataDependent, DropoutDiscriminator, FadeGenerator, FunctionalDiscriminator, FunctionalGenerator,
    ResidualDiscriminator, UpsampleGenerator,
)  # fmt: skip
from test_fuse import assert_same, fused_calls, train
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

import fastgan

IMAGES, LATENT = (4, 3, 32, 32), (4, 16)
NETWORKS = {
    "functional generator": (FunctionalGenerator, LATENT),
    "functional discriminator": (FunctionalDiscriminator, IMAGES),
    "residual": (ResidualDiscriminator, IMAGES),
    "upsample": (UpsampleGenerator, LATENT),
    "no dropout": (lambda: DropoutDiscriminator(0.0), IMAGES),
    "fade": (FadeGenerator, (4, 16, 8, 8)),
    "data dependent": (DataDependent, IMAGES),
}


def pair(name, dtype=torch.float32):
    torch.manual_seed(0)
    build, shape = NETWORKS[name]
    plain = build().to(dtype)
    return plain, fastgan.fuse(copy.deepcopy(plain)), torch.randn(shape, dtype=dtype)


def reported(module):
    """The report of fuse() by convolution, in words."""
    _, report = fastgan.fuse(module, report=True)
    return {layer.name: str(layer) for layer in report.layers}


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_gradients_and_statistics_agree_in_both_modes(name):
    plain, fused, x = pair(name, torch.float64)
    if name == "no dropout":  # draws noise in training: both from the same numbers
        plain, fused = Seeded(plain), Seeded(fused)
    assert_same(plain, fused, x, rtol=1e-7, atol=1e-9)


class Seeded(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        torch.manual_seed(3)
        return self.network(x)


@pytest.mark.parametrize("name", ["functional generator", "functional discriminator", "upsample", "residual"])
def test_float32_agrees_too(name):
    plain, fused, x = pair(name)
    assert_same(plain, fused, x, rtol=1e-3, atol=1e-4)
    assert isinstance(fused, type(plain))


def test_training_gives_the_same_losses_as_the_plain_networks():
    torch.manual_seed(0)
    plain = FunctionalGenerator(), FunctionalDiscriminator()
    fused = [fastgan.fuse(copy.deepcopy(network)) for network in plain]
    plain_losses, fused_losses = train(*plain, 20), train(*fused, 20)
    assert fused_losses[:8] == pytest.approx(plain_losses[:8], rel=1e-4)
    assert fused_losses == pytest.approx(plain_losses, rel=2e-2)
    for a, b in zip(plain, fused):
        assert list(a.state_dict()) == list(b.state_dict())
        a.load_state_dict(b.state_dict())


def test_consecutive_layers_run_as_one_operator_where_it_gains():
    fused = fastgan.fuse(FunctionalDiscriminator(16))
    x = torch.randn(IMAGES)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fused(x)
    names = [event.name for event in profile.events()]
    assert names.count("fastgan::conv_stack") == 1 and "fastgan::conv2d_act" not in names


def test_dropout_and_training_branches_follow_the_mode():
    plain, fused, x = pair("no dropout")
    plain.drop.p = fused.drop.p = plain.p = fused.p = 0.5
    for training in (True, False, True):
        plain.train(training), fused.train(training)
        torch.manual_seed(1)
        expected = plain(x)
        torch.manual_seed(1)
        torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(fused(x), fused(x))  # drawn anew


def test_attributes_and_arguments_that_change_are_followed():
    plain, fused, x = pair("fade")
    shift = torch.randn(1, 3, 1, 1)
    for alpha in [0.0, 0.5, *(i / 20 for i in range(12)), 1.0, 2.0]:  # more values than traces are kept for
        plain.alpha = fused.alpha = alpha
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-5)
    for args, kwargs in [((x, shift), {}), ((x,), dict(shift=shift, scale=0.5)), ((x, None, 3.0), {})]:
        torch.testing.assert_close(fused(*args, **kwargs), plain(*args, **kwargs), rtol=1e-4, atol=1e-5)


def test_every_required_argument_is_taken_for_a_tensor_and_optional_ones_at_their_default():
    fused = fastgan.fuse(FadeGenerator())
    x, shift = torch.randn(4, 16, 8, 8), torch.randn(1, 3, 1, 1)
    assert fused_calls(fused, x) == ["conv2d_act", "conv_transpose2d_act", "conv_transpose2d_act"]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fused(x, shift)
    assert "fastgan::conv2d_act" in [event.name for event in profile.events()]


class Merge(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x, skip, times=2):
        h = F.relu(self.conv(x)) - skip
        return h * 3 if times is True else h / times if isinstance(times, float) else h * times


def test_keyword_tensors_may_come_in_any_order():
    torch.manual_seed(0)
    plain = Merge()
    fused = fastgan.fuse(plain)
    x, skip = torch.randn(2, 3, 5, 5), torch.randn(2, 1, 1, 1)
    torch.testing.assert_close(fused(x=x, skip=skip), plain(x, skip))
    torch.testing.assert_close(fused(skip=skip, x=x), plain(x, skip))


@pytest.mark.parametrize("by_name", [False, True])
def test_arguments_that_are_equal_and_of_different_types_have_traces_of_their_own(by_name):
    plain = Merge()
    fused = fastgan.fuse(plain)
    x, skip = torch.randn(2, 3, 5, 5), torch.randn(2, 1, 1, 1)
    for times in (1, True, 1.0, 1):
        found = fused(x, skip, times=times) if by_name else fused(x, skip, times)
        torch.testing.assert_close(found, plain(x, skip, times))


GENERATORS = types.SimpleNamespace(python=random.Random(0))
TORCHS = torch.Generator()


class Refused(nn.Module):
    """One forward a name; each does something that a trace would lose."""

    def __init__(self, how):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.calls, self.history, self.how = 0, [], how

    def forward(self, x):
        h = F.relu(self.conv(x))
        return getattr(self, self.how)(h)

    def count(self, h):
        self.calls += 1
        return h

    def keep(self, h):
        self.history.append(h)
        return h

    def noise(self, h):
        return h + torch.randn(1)

    def no_grad(self, h):
        with torch.no_grad():
            return h * 2

    def branch(self, h):
        return h if h.sum() > 0 else -h

    def shape_check(self, h):
        if h.dim() != 4:
            raise ValueError("four dimensions wanted")
        return h

    def grad_mode(self, h):
        return h if torch.is_grad_enabled() else 2 * h

    def prints(self, h):
        print("called")
        return h

    def draws(self, h):
        return h if random.random() < 2 else -h

    def draws_from_pythons(self, h):
        return h if GENERATORS.python.random() < 2 else -h

    def draws_from_numpys(self, h, generator=numpy.random.default_rng(0)):
        return h if generator.random() < 2 else -h

    def draws_from_torchs(self, h):
        return h if torch.rand(1, generator=TORCHS).item() < 2 else -h

    def asks_the_time(self, h):
        return h if time.time() > 0 else -h

    def evaluates(self, h):
        self.conv.eval()
        return h

    def checkpoints(self, h):
        return checkpoint(torch.exp, h, use_reentrant=False)


@pytest.mark.parametrize("how, reason", [
    ("draws", "it draws random numbers"), ("asks_the_time", "it calls time.time"), ("count", "it sets self.calls"),
    ("noise", "it makes a tensor of its own"), ("no_grad", "it enters a context"),
    ("branch", "symbolically traced variables cannot be used"), ("shape_check", "symbolically traced variables"),
    ("grad_mode", "it calls is_grad_enabled"), ("prints", "it calls print"), ("evaluates", "it sets self.conv.training"),
    ("draws_from_pythons", "it draws random numbers"), ("draws_from_numpys", "it has a random number generator"),
    ("draws_from_torchs", "it has a random number generator"), ("checkpoints", "it calls torch.utils.checkpoint"),
])  # fmt: skip
def test_what_a_trace_would_lose_is_left_alone_with_the_reason(how, reason):
    plain = Refused(how)
    state = torch.get_rng_state(), random.getstate()
    fused, report = fastgan.fuse(plain, report=True)
    assert torch.equal(torch.get_rng_state(), state[0]) and random.getstate() == state[1]
    assert type(fused) is Refused and plain.calls == fused.calls == 0
    assert report.fused == 0 and reason in report.layers[0].reason
    assert "forward of Refused cannot be traced" in str(report)
    x = torch.randn(2, 3, 5, 5)
    torch.manual_seed(0)
    expected = plain(x)
    torch.manual_seed(0)
    assert torch.equal(fused(x), expected)


def test_a_list_that_forward_fills_is_refused_and_not_filled_with_stand_ins():
    fused, report = fastgan.fuse(Refused("keep"), report=True)
    assert fused.history == [] and "it changes the contents of self.history" in str(report)
    fused(torch.randn(2, 3, 5, 5))
    assert [type(h) for h in fused.history] == [torch.Tensor]


def test_hooks_parametrizations_and_replaced_children_are_honoured_at_every_call():
    plain, fused, x = pair("functional discriminator", torch.float64)  # of which each layer is an operator
    seen = []
    handle = fused.bn2.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-5)
    assert seen == [(4, 16, 8, 8)] and fused_calls(fused, x).count("conv2d_bn_act") == 1
    handle.remove()
    assert fused_calls(fused, x).count("conv2d_bn_act") == 2
    fused.act = plain.act = nn.ELU()
    fused.conv2 = plain.conv2 = spectral_norm(nn.Conv2d(8, 16, 4, 2, 1)).double()
    plain.eval(), fused.eval()
    fused.load_state_dict(plain.state_dict())  # of which fused has seen more batches
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-5)


class Asks(nn.Module):
    """One forward a name; each asks what a stand-in for a tensor would answer differently."""

    def __init__(self, how):
        super().__init__()
        self.conv, self.how = nn.Conv2d(3, 4, 3), how

    def forward(self, x):
        return getattr(self, self.how)(x, self.conv(x))

    def is_instance(self, x, h):
        return h * 2 if isinstance(x, torch.Tensor) else h

    def is_one_of(self, x, h):
        return torch.cat([h] if isinstance(x, (list, tuple)) else [h, h])

    def is_optional(self, x, h):
        return h * 2 if isinstance(x, torch.Tensor | None) else h

    def is_tensor(self, x, h):
        return h * 2 if torch.is_tensor(x) else h

    def has_attribute(self, x, h):
        return h if hasattr(x, "tensors") else h * 2

    def has_method(self, x, h):
        return h * 2 if hasattr(x, "relu") else h

    def gets_attribute(self, x, h):
        return h * getattr(x, "weight_of_sample", 2)

    def is_type(self, x, h):
        return h * 2 if type(x) is torch.Tensor else h

    def is_legacy_type(self, x, h):
        return h * 2 if isinstance(x, torch.FloatTensor) else h

    def is_parameter(self, x, h):
        return h * 2 if isinstance(x, nn.Parameter) else h

    def is_callable(self, x, h):
        return h if callable(x) else h * 2

    def result_is_tensor(self, x, h):
        return h * 2 if isinstance(h, torch.Tensor) else h

    def size_is_int(self, x, h):
        return h * 2 if isinstance(x.shape[0], int) else h

    def dtype_is(self, x, h):
        return h * 2 if h.dtype is torch.float32 else h

    def dtype_is_in_set(self, x, h):
        return h * 2 if x.dtype in {torch.float32} else h

    def dtype_is_a_key(self, x, h):
        return h * {torch.float32: 2.0}.get(x.dtype, 1.0)

    def device_in_words(self, x, h):
        return h * 2 if "cpu" in str(x.device) else h

    def formatted(self, x, h):
        return h * 2 if f"{x.dtype}" == "torch.float32" else h

    def tensor_in_words(self, x, h):
        return h * len(repr(x))

    def has_no_graph(self, x, h):
        return h if h.grad_fn is None else h * 2

    def uses_metadata(self, x, h):
        return h.to(dtype=x.dtype) * x.to(x.device).mean()

    def counts_images(self, x, h):
        return h.view(len(x), -1) * len(x[0]) / len(h)

    def swallows(self, x, h):
        try:
            return h if isinstance(h, tuple) else h * 2
        except Exception:
            return h

    def others(self, x, h):
        known = isinstance(self.conv, nn.Conv2d) and type(self.how) is str and isinstance(type("New", (), {}), type)
        known = known and type(self.conv) is nn.Conv2d and type(self) in (Asks, *Asks.__subclasses__())
        return h * 2 if known and hasattr(self, "conv") and getattr(self, "nothing", None) is None and callable(F.relu) else h


ANSWERED = (
    "is_instance", "is_one_of", "is_optional", "is_tensor", "has_method", "is_callable", "others", "uses_metadata", "counts_images",
)  # fmt: skip


@pytest.mark.parametrize("how", [name for name in vars(Asks) if not name.startswith("_") and name != "forward"])
def test_what_forward_asks_about_a_tensor_is_answered_as_for_one_or_refused(how):
    torch.manual_seed(0)
    plain, x = Asks(how), torch.randn(2, 3, 5, 5)
    names = globals().copy()
    fused, report = fastgan.fuse(plain, report=True)
    assert globals() == names
    for tensor in (x, nn.Parameter(x), torch.randn(5, 3, 5, 5)):
        torch.testing.assert_close(fused(tensor), plain(tensor), rtol=1e-4, atol=1e-5)
    assert report.layers[0].fused == (how in ANSWERED)
    if how not in ANSWERED:
        assert re.search("forward of Asks cannot be traced: it (calls|looks at) ", report.layers[0].reason)


class Optional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.gain = nn.Conv2d(3, 4, 3), 2.0

    def forward(self, x):
        h = self.conv(x) * getattr(self, "gain", 1.0)
        return -h if hasattr(self, "negative") else h


def test_attributes_asked_for_by_name_are_followed():
    torch.manual_seed(0)
    plain, x = Optional(), torch.randn(2, 3, 5, 5)
    fused = fastgan.fuse(copy.deepcopy(plain))
    changes = [lambda network: None, lambda network: setattr(network, "gain", 3.0), lambda network: setattr(network, "negative", True),
               lambda network: delattr(network, "gain"), lambda network: delattr(network, "negative")]  # fmt: skip
    for change in changes:
        change(plain), change(fused)
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-5)
    assert fused_calls(fused, x) == ["conv2d_act"]


class Structured(nn.Module):
    """Each of its parts is looked at in a way of its own."""

    def __init__(self):
        super().__init__()
        self.main = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1))
        self.layers, self.extra = nn.ModuleList([nn.Conv2d(8, 8, 1)]), nn.ModuleList()
        self.act, self.names = nn.ReLU(), nn.ModuleDict()
        self.register_module("last", None)

    def forward(self, x):
        for layer in self.main:
            x = layer(x)
        for layer in self.layers:
            x = layer(x)
        if len(self.extra):
            x = x * 3
        if self.act is not None:
            x = self.act(x)
        if self.last is not None:
            x = self.last(x)
        return -x if "negate" in self.names else x


CHANGES = {
    "append": lambda network: network.layers.append(nn.Conv2d(8, 8, 1)),
    "append to an empty list": lambda network: network.extra.append(nn.Identity()),
    "None": lambda network: setattr(network, "act", None),
    "no longer None": lambda network: setattr(network, "last", nn.Sigmoid()),
    "in a dict": lambda network: network.names.update({"negate": nn.Identity()}),
    "insert": lambda network: network.main.insert(1, nn.Tanh()),
    "remove": lambda network: network.main.__delitem__(3),
    "replace a list": lambda network: setattr(network, "layers", nn.ModuleList([nn.Tanh(), nn.Conv2d(8, 8, 1)])),
    "delete": lambda network: network.layers.__delitem__(0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_children_that_come_or_go_are_followed(change):
    torch.manual_seed(0)
    plain, x = Structured(), torch.randn(2, 3, 6, 6)
    fused = fastgan.fuse(copy.deepcopy(plain))
    before = fused(x)
    torch.testing.assert_close(before, plain(x), rtol=1e-4, atol=1e-5)
    for network in (plain, fused):
        torch.manual_seed(1)
        CHANGES[change](network)
    after = plain(x)
    torch.testing.assert_close(fused(x), after, rtol=1e-4, atol=1e-5)
    assert after.shape != before.shape or not torch.allclose(after, before, rtol=1e-3)
    torch.manual_seed(0)
    for network in (plain, fused):
        network.zero_grad()
        network(x).square().sum().backward()
    for theirs, ours in zip(plain.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-2, atol=1e-2)
    assert fused_calls(fused, x)


def test_batch_norm_folded_after_fuse_may_be_in_a_sequential_that_forward_walks():
    torch.manual_seed(0)
    network, x = Structured(), torch.randn(2, 3, 6, 6)
    network(x)
    folded = fastgan.nn.fold_batch_norm(fastgan.fuse(network))
    assert len(folded.main) == 3
    torch.testing.assert_close(folded(x), network.eval()(x), rtol=1e-4, atol=1e-5)


def test_children_of_modules_that_forward_only_calls_need_no_new_trace():
    plain, x = Structured(), torch.randn(2, 3, 6, 6)
    plain.act = nn.Sequential(nn.ReLU())
    fused = fastgan.fuse(copy.deepcopy(plain))
    before = list(fused._fastgan_plans)
    for network in (plain, fused):
        network.act.append(nn.Sigmoid())
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-5)
    assert fused._fastgan_plans == before


class Mixed(nn.Module):
    """Layers that cannot be fused, or not with what follows."""

    def __init__(self):
        super().__init__()
        self.reflect = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")
        self.spectral = spectral_norm(nn.Conv2d(8, 8, 3, padding=1))
        self.hooked = nn.Conv2d(8, 8, 3, padding=1)
        self.hooked.register_forward_hook(lambda module, args, output: None)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.one, self.other = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.norm = nn.BatchNorm2d(8)
        self.elu = nn.Conv2d(8, 8, 1)
        self.never = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        x = F.relu(self.spectral(F.relu(self.reflect(x))))
        x = torch.tanh(self.twice(F.relu(self.hooked(x)))) if x is not None else x
        h = self.twice(x)
        x = torch.sigmoid(h) + h
        x = self.norm(self.one(x)) + self.norm(self.other(x))
        return F.elu(self.elu(x))


def test_the_report_names_every_convolution_and_why():
    torch.manual_seed(0)
    plain = Mixed()
    assert reported(plain) == {
        "reflect": "as it was: its padding mode is 'reflect'",
        "spectral": "as it was: it has a parametrization",
        "hooked": "as it was: it has a hook",
        "twice": "fused, alone (its output is used 2 times)",
        "one": "fused, alone (followed by norm (BatchNorm2d, shared))",
        "other": "fused, alone (followed by norm (BatchNorm2d, shared))",
        "elu": "fused, alone (followed by elu)",
        "never": "as it was: no call of it was seen in forward of Mixed",
    }
    fused = fastgan.fuse(copy.deepcopy(plain))
    plain.eval(), fused.eval()  # spectral norm's iteration would go on between the two
    assert_same(plain, fused, torch.randn(2, 3, 6, 6), modes=(False,))


def test_the_report_counts_and_lists_sequentials_and_nested_modules():
    assert reported(ResidualDiscriminator())["blocks.1.conv1"] == "fused with blocks.1.bn1 and relu"
    assert reported(ResidualDiscriminator())["blocks.0.conv2"] == "fused with blocks.0.bn2"
    _, report = fastgan.fuse(DataDependent(), report=True)
    assert str(report).startswith("1 of 2 convolutions fused\n")
    assert [layer.fused for layer in report.layers] == [False, True]
    fused, again = fastgan.fuse(fastgan.fuse(UpsampleGenerator()), report=True)
    assert again.fused == 4 and again.layers[0].batch_norm == "norms.0"
    assert again.layers[0].activation == "leaky_relu(0.2)"


def test_batch_norm_called_in_another_order_keeps_its_statistics():
    plain = Mixed()
    plain.spectral = nn.Conv2d(8, 8, 3, padding=1)
    plain.double()  # in float32 the gradients next to a batch norm of 72 values differ by PyTorch's own rounding
    fused = fastgan.fuse(copy.deepcopy(plain))
    assert_same(plain, fused, torch.randn(2, 3, 6, 6, dtype=torch.float64))


def test_copies_pickles_and_functional_call():
    plain, fused, x = pair("functional generator", torch.float64)
    plain.eval(), fused.eval()
    for clone in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), fastgan.fuse(fused)):
        assert type(clone) is type(fused) and fused_calls(clone, x) == fused_calls(fused, x) != []
        torch.testing.assert_close(clone(x), plain(x), rtol=1e-4, atol=1e-5)
    other = {name: value + 0.1 for name, value in plain.named_parameters()}
    torch.testing.assert_close(
        torch.func.functional_call(fused, other, x), torch.func.functional_call(plain, other, x), rtol=1e-4, atol=1e-5
    )


class Projection(nn.Module):
    """With a parameter of its own beside its layers."""

    def __init__(self):
        super().__init__()
        self.conv, self.weight = nn.Conv2d(3, 8, 3), nn.Parameter(torch.randn(5, 8))

    def forward(self, x, scale=1.0):
        return scale * F.relu(self.conv(x)).mean((2, 3)) @ self.weight.T


def test_a_fused_module_may_be_parametrized_itself():
    torch.manual_seed(0)
    plain, x = Projection(), torch.randn(2, 3, 5, 5)
    fused = fastgan.fuse(copy.deepcopy(plain))
    before = type(fused)
    weight_norm(plain), weight_norm(fused)
    assert_same(plain, fused, x)
    torch.testing.assert_close(fused(x, scale=2.0), plain(x, scale=2.0))
    torch.testing.assert_close(copy.deepcopy(fused)(x), plain(x))
    _, report = fastgan.fuse(fused, report=True)
    assert report.layers[0].activation == "relu"
    parametrize.remove_parametrizations(fused, "weight")
    assert type(fused) is before
    torch.testing.assert_close(fused(x), plain(x))


class Locked(nn.Module):
    """Holds what cannot be copied, and hands over the rest in a form of its own."""

    def __init__(self):
        super().__init__()
        self.conv, self.lock = nn.Conv2d(3, 8, 3), threading.Lock()

    def __getstate__(self):
        state = self.__dict__.copy()
        del state["lock"]
        return state, "unlocked"

    def __setstate__(self, state):
        super().__setstate__(state[0])
        self.lock = threading.Lock()

    def forward(self, x):
        return F.relu(self.conv(x))


class LockedSequential(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 8, 3), nn.ReLU())
        self.lock = threading.Lock()

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "lock"}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.lock = threading.Lock()


@pytest.mark.parametrize("build", [Locked, LockedSequential])
def test_copies_and_pickles_are_made_by_the_modules_own_getstate_and_setstate(build):
    fused, x = fastgan.fuse(build()), torch.randn(2, 3, 5, 5)
    for clone in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert type(clone) is type(fused) and fused_calls(clone, x) == ["conv2d_act"] and clone.lock is not fused.lock
        torch.testing.assert_close(clone(x), fused(x))


def test_not_in_place_leaves_the_module_as_it_was():
    plain = FunctionalGenerator()
    fused = fastgan.fuse(plain)
    assert type(plain) is FunctionalGenerator and "_fastgan_plans" not in plain.__dict__
    assert all(a is b for a, b in zip(plain.parameters(), fused.parameters(), strict=True))
    assert fastgan.fuse(plain, inplace=True) is plain and isinstance(plain, FunctionalGenerator)


def test_gradient_penalty_through_a_traced_discriminator():
    plain, fused, x = pair("functional discriminator", torch.float64)
    results = []
    for network in (plain, fused):
        torch.manual_seed(1)
        penalty = fastgan.losses.gradient_penalty(network, x, x.flip(0))
        results.append([penalty, *torch.autograd.grad(penalty, list(network.parameters()), allow_unused=True)])
    for theirs, ours in zip(*results):
        assert (theirs is None) == (ours is None)
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def test_compiles_without_graph_breaks():
    torch._dynamo.reset()
    plain, fused, x = pair("functional discriminator")
    fused.compile(fullgraph=True, backend="aot_eager")
    assert_same(plain, fused, x)


def test_the_page_shows_the_report_that_its_program_prints():
    page = (Path(__file__).parent.parent / "docs" / "fuse.md").read_text()
    program, printed = re.search(r"```python\n(.*?)```\n\nprints\n\n```\n(.*?)```", page, re.DOTALL).groups()
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(program, {"__name__": "page"})
    assert output.getvalue() == printed


def test_garbage_collected_while_tracing_is_not_taken_for_forwards_doing():
    def read_the_time(phase, info):  # as Hypothesis does
        time.perf_counter()

    threshold = gc.get_threshold()
    gc.callbacks.append(read_the_time)
    gc.set_threshold(1)
    try:
        _, report = fastgan.fuse(FunctionalDiscriminator(), report=True)
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(read_the_time)
    assert gc.isenabled() and all(layer.fused for layer in report.layers), report


class ChangedInPlace(nn.Module):
    """One forward a name; each changes what leaves LeakyReLU."""

    def __init__(self, how):
        super().__init__()
        self.conv, self.act, self.elu, self.how = nn.Conv2d(3, 16, 4, 2, 1), nn.LeakyReLU(0.2), nn.ELU(inplace=True), how

    def forward(self, x):
        return getattr(self, self.how)(self.conv(x))

    def by_a_module(self, h):
        return self.elu(self.act(h))

    def by_a_method(self, h):
        return F.leaky_relu(h, 0.2).mul_(2)

    def by_a_function(self, h):
        return F.elu(F.leaky_relu(h, 0.2), inplace=True)

    def later(self, h):
        h = self.act(h)
        return h.mean() + F.elu_(h)


@pytest.mark.parametrize("how", [name for name in vars(ChangedInPlace) if name.startswith("by") or name == "later"])
def test_what_leaves_leaky_relu_may_be_changed_in_place(how):
    torch.manual_seed(0)
    plain = ChangedInPlace(how)
    assert_same(plain, fastgan.fuse(copy.deepcopy(plain)), torch.randn(4, 3, 8, 8).contiguous(memory_format=torch.channels_last))
    assert "its output is changed in place" in reported(plain)["conv"]


def meanwhile():
    """What happens while Interrupted's forward runs."""


class Interrupted(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x, scale=1.0):
        h = self.conv(x)
        meanwhile()
        return scale * F.relu(h)


def test_another_threads_calls_while_a_module_is_traced_are_its_own(monkeypatch):
    fused, other = fastgan.fuse(Interrupted()), nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    x, z, results = torch.randn(2, 3, 5, 5), torch.randn(4, 2), []
    expected = fused(x), other(z)

    def call():
        try:
            results.extend([fused(x), other(z)])
        except Exception as error:
            results.append(error)

    def call_in_another_thread():
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()

    monkeypatch.setattr(sys.modules[__name__], "meanwhile", call_in_another_thread)
    torch.testing.assert_close(fused(x, scale=2.0), 2 * expected[0])
    torch.testing.assert_close(results[:2], [*expected])  # the trace is refused, as it waits: forward runs once more


def test_two_threads_that_trace_leave_torch_as_it_was(monkeypatch):
    methods = nn.Module.__call__, nn.Module.__getattr__
    for method in methods:
        monkeypatch.setattr(nn.Module, method.__name__, method)  # put back for other tests
    inside, done = threading.Event(), threading.Event()
    second = threading.Thread(target=lambda: fastgan.fuse(Interrupted()))

    def wait_for_the_other():
        if threading.current_thread() is second:
            inside.set()
            done.wait(10)
        elif second.ident is None:
            second.start()
            inside.wait(0.5)

    monkeypatch.setattr(sys.modules[__name__], "meanwhile", wait_for_the_other)
    fastgan.fuse(Interrupted())
    done.set()
    second.join()
    assert (nn.Module.__call__, nn.Module.__getattr__) == methods


class Scale:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, x):
        return x * self.factor


class Kept(nn.Module):
    """Reads what it keeps in attributes that can be replaced or changed."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.first = self.second = nn.ReLU()
        self.bias = self.shift = nn.Parameter(torch.ones(1))
        self.impl, self.scale = self.stage1, Scale(2.0)
        self.slope = functools.partial(F.leaky_relu, negative_slope=0.2)
        self.squash, self.negate = torch.sigmoid, lambda x: -x

    def stage1(self, x):
        return x * 2

    def stage2(self, x):
        return x * 3

    def forward(self, x):
        return type(self).act(self, self.conv(x))


KEPT = {
    "method": (lambda net, h: net.impl(h), lambda net: setattr(net, "impl", net.stage2), True),
    "alias": (lambda net, h: net.first(h) + net.second(-h), lambda net: setattr(net, "second", nn.Tanh()), True),
    "tied parameter": (lambda net, h: h * net.bias + net.shift, lambda net: setattr(net, "shift", nn.Parameter(torch.zeros(1))), True),
    "partial": (lambda net, h: net.slope(h), lambda net: setattr(net, "slope", functools.partial(F.leaky_relu)), True),
    "functions": (lambda net, h: net.squash(net.negate(h)), lambda net: setattr(net, "squash", torch.tanh), True),
    "object": (lambda net, h: net.scale(h), lambda net: setattr(net.scale, "factor", 3.0), False),
    "parameters": (lambda net, h: h * len(list(net.parameters())), lambda net: setattr(net, "new", nn.Parameter(torch.ones(1))), False),
    "a parameter's state": (lambda net, h: h * 2 if next(net.conv.parameters()).requires_grad else h,
                            lambda net: net.requires_grad_(False), False),
    "buffers": (lambda net, h: h * (1 + len(net._buffers)), lambda net: net.register_buffer("new", torch.ones(1)), False),
}  # fmt: skip


@pytest.mark.parametrize("what", KEPT)
def test_what_the_module_keeps_is_followed_or_refused(what):
    torch.manual_seed(0)
    forward, change, traced = KEPT[what]
    plain, x = Kept(), torch.randn(2, 3, 5, 5)
    plain.__class__ = type("Kept", (Kept,), {"act": forward})
    fused, report = fastgan.fuse(copy.deepcopy(plain), report=True)
    assert report.layers[0].fused == traced, report
    before = fused(x)
    torch.testing.assert_close(before, plain(x), rtol=1e-4, atol=1e-5)
    change(plain), change(fused)
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(fused(x), before)


class Changes(nn.Module):
    """One forward a name; each changes a tensor in place that goes by another name too."""

    def __init__(self, how):
        super().__init__()
        self.conv, self.norm, self.last, self.short = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.Conv2d(3, 4, 3)
        self.how = how

    def forward(self, x):
        return getattr(self, self.how)(x)

    def residual(self, x):
        h = self.norm(self.conv(x))
        skip = h
        h += self.short(x)
        return self.last(F.relu(h)) + skip

    def activated(self, x):
        h = skip = F.leaky_relu(self.conv(x), 0.2)
        h *= 0.5
        return torch.tanh(self.last(h)) + skip

    def between_two_layers(self, x):
        h = skip = self.conv(x)
        h -= 0.5
        return F.relu(self.norm(h)) + skip

    def of_its_argument(self, x):
        x -= 0.5
        return F.relu(self.conv(x))

    def of_a_view(self, x):
        view = x[:, :1]
        view -= 5
        transposed = x.mT
        transposed /= 2
        return F.relu(self.conv(x))

    def of_a_size(self, x):
        h = F.relu(self.conv(x))
        size = before = x.shape[0]
        size += 1
        return h * size + before


@pytest.mark.parametrize("how", [name for name in vars(Changes) if not name.startswith("_") and name != "forward"])
def test_tensors_changed_in_place_are_changed_under_all_their_names(how):
    torch.manual_seed(0)
    plain = Changes(how).double()
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    fused = fastgan.fuse(copy.deepcopy(plain))
    assert any(call.startswith("conv") for call in fused_calls(fused, x.clone()))
    plain.train(), fused.train()
    arguments = x.clone(), x.clone()
    outputs = [network(argument) for network, argument in zip((plain, fused), arguments)]
    torch.testing.assert_close(*outputs)
    assert torch.equal(*arguments)
    for network, output in zip((plain, fused), outputs):
        output.square().sum().backward()
    for theirs, ours in zip(plain.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


class SetsData(Changes):
    def forward(self, x):
        x.data = x.data * 2
        return F.relu(self.conv(x))


def test_an_attribute_set_on_a_tensor_is_refused():
    assert "it sets the attribute data of a tensor" in reported(SetsData(""))["conv"]


def test_packages_beside_torchs_whose_names_begin_like_it_are_watched():
    name = "torchnetworks"
    source = Path(torch.__file__).parent.with_name(name) / "model.py"
    scope = {"__name__": name, "nn": nn, "F": F}
    program = """
class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.gain = nn.Conv2d(3, 4, 3), 1.0

    def forward(self, x):
        return F.dropout(F.relu(self.conv(x)), 0.5, self.training) * self.gain
"""
    exec(compile(program, str(source), "exec"), scope)
    plain, x = scope["Network"](), torch.randn(2, 3, 5, 5)
    fused = fastgan.fuse(plain)
    assert fused_calls(fused, x) == ["conv2d_act"]
    plain.eval(), fused.eval()
    plain.gain = fused.gain = 3.0
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-5)


def test_a_profiler_goes_on_and_does_not_keep_forward_from_being_traced():
    profiler = cProfile.Profile()
    profiler.enable()
    _, report = fastgan.fuse(FunctionalDiscriminator(), report=True)
    copy.copy(report)
    profiler.disable()
    assert all(layer.fused for layer in report.layers), report
    assert "copy" in {name for _, _, name in pstats.Stats(profiler).stats}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], with_stack=True):
        _, report = fastgan.fuse(FunctionalDiscriminator(), report=True)
    assert all(layer.fused for layer in report.layers), report


def test_a_fused_module_has_the_signature_of_its_class_and_can_be_traced():
    plain, x = FadeGenerator(), torch.randn(4, 16, 8, 8)
    fused = fastgan.fuse(plain)
    assert inspect.signature(fused.forward) == inspect.signature(plain.forward)
    defaults = {name: p.default for name, p in inspect.signature(plain.forward).parameters.items() if p.default is not p.empty}
    traced = torch.fx.symbolic_trace(fused, concrete_args=defaults)
    torch.testing.assert_close(traced(x), plain(x), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_copied_is_fused_in_place():
    plain = FunctionalDiscriminator()
    plain.lock = threading.Lock()
    with pytest.raises(TypeError, match="fuse: module has an attribute that cannot be copied .*pass inplace=True"):
        fastgan.fuse(plain)
    assert fastgan.fuse(plain, inplace=True) is plain and type(plain) is not FunctionalDiscriminator
