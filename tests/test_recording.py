"""Recordings: steps on the CPU that are repeated without Python."""

import contextlib
import copy
import re
import resource
import tempfile
import types
import warnings

import numpy as np
import pytest
import torch
from run_files import tensors
from torch import nn
from torch.nn import functional as F

from fastgan import _extension
from fastgan.data import Batch, ImageDataset
from fastgan.train import CatGANConfig, DCGANConfig, GANConfig, Objective, Trainer, TrainingError
from fastgan.train.graph import WARM_UP
from fastgan.train.recording import CPURecorder
from test_cuda_graph import assert_same_run, interrupt, poison, saved

pytestmark = [
    pytest.mark.skipif(not _extension.has_kernels("cpu"), reason="the compiled extension is missing"),
    pytest.mark.usefixtures("same_thread_count_after_the_test"),
]

# 80 images of the digits 0 to 9 in turn.
DATASET = ImageDataset(
    "noise", torch.randint(0, 256, (80, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)),
    torch.arange(80) % 10,
)  # fmt: skip
GAN = dict(image_size=16, batch_size=4, digit=None, latent_dim=5, hidden_features=9, epochs=6, log_every=1)
CATGAN = dict(architecture="mlp", image_size=16, batch_size=20, labels="20", labeled_batch=10, latent_dim=5, epochs=3, log_every=1)


DCGAN = dict(image_size=16, channels=1, batch_size=16, base_channels=4, latent_dim=5, epochs=3, log_every=1)


def trainer_in(folder, config_class=GANConfig, checkpoint=None, **settings):
    defaults = {GANConfig: GAN, CatGANConfig: CATGAN, DCGANConfig: DCGAN}[config_class]
    config = config_class(output=str(folder), device="cpu", threads=2, **{**defaults, **settings})
    trainer = Trainer(config, DATASET, checkpoint)
    trainer.objective.judged = None  # the real test set's images are larger
    return trainer


def run(folder, config_class=GANConfig, **settings):
    """A finished run, and whether its steps were repeated."""
    trainer = trainer_in(folder, config_class, **settings)
    trainer.train()
    return trainer.graph.captured


@pytest.mark.parametrize("config_class, settings", [
    (GANConfig, {}), (GANConfig, {"digit": 3, "batch_size": 2}), (GANConfig, {"gradient_penalty": 10.0}), (GANConfig, {"r1": 1.0}),
    (GANConfig, {"generator_loss": "hinge", "discriminator_learning_rate": 1e-4}), (GANConfig, {"fuse": False}),
    (CatGANConfig, {}), (CatGANConfig, {"labels": "0", "views": 1}), (CatGANConfig, {"labels": "all", "augment": False}),
    (CatGANConfig, {"generator_loss": "feature-matching", "ema": 0.0}), (CatGANConfig, {"decay": 1.0, "fuse": False}),
    (CatGANConfig, {"architecture": "conv", "base_channels": 4}), (DCGANConfig, {}), (DCGANConfig, {"augment": True, "ema": 0.0}),
    (DCGANConfig, {"precision": "bf16", "decay": 0.5}), (DCGANConfig, {"spectral_norm": True, "gradient_penalty": 1.0}),
    (DCGANConfig, {"discriminator_steps": 2}), (DCGANConfig, {"fuse": False, "generator_loss": "wasserstein"}),
], ids=str)  # fmt: skip
def test_repeated_steps_are_the_steps_to_the_bit(tmp_path, config_class, settings):
    assert not run(tmp_path / "eager", config_class, cpu_graph=False, **settings)
    assert run(tmp_path / "recorded", config_class, **settings)
    assert_same_run(tmp_path / "recorded", tmp_path / "eager")


@pytest.mark.parametrize("config_class", [GANConfig, CatGANConfig])
@pytest.mark.parametrize("stop", [1, WARM_UP + 1, 9])
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, config_class, stop):
    run(tmp_path / "whole", config_class)
    run(tmp_path / "part", config_class, max_steps=stop)
    rest = trainer_in(tmp_path / "part", config_class, saved(tmp_path / "part"), resume=str(tmp_path / "part"))
    rest.train()
    assert rest.graph.captured == (rest.total_steps > stop + WARM_UP)
    assert_same_run(tmp_path / "part", tmp_path / "whole")


def test_gradients_are_those_of_the_step(tmp_path):
    found = []
    for cpu_graph in (False, True):
        trainer = trainer_in(tmp_path / str(cpu_graph), CatGANConfig, cpu_graph=cpu_graph, epochs=20)
        torch.manual_seed(3)
        for batch in [*trainer.batches.epoch(0), *trainer.batches.epoch(1)]:
            trainer.train_step(batch)
            trainer.step += 1
        assert trainer.graph.captured == cpu_graph
        found.append([parameter.grad for network in trainer.networks.values() for parameter in network.parameters()])
    assert any(gradient is not None for gradient in found[0])
    for ours, eager in zip(*found, strict=True):
        assert (ours is None) == (eager is None) and (ours is None or torch.equal(ours, eager))


def test_a_batch_of_another_shape_runs_eagerly_in_between(tmp_path):
    states = []
    for cpu_graph in (False, True):
        trainer = trainer_in(tmp_path / str(cpu_graph), CatGANConfig, cpu_graph=cpu_graph)
        batches = [*trainer.batches.epoch(0), *trainer.batches.epoch(1)]
        batches[5] = Batch(batches[5].images[:15], batches[5].labels[:15])
        torch.manual_seed(3)
        for batch in batches:
            trainer.train_step(batch)
            trainer.step += 1
        assert trainer.graph.captured == cpu_graph
        trainer.save()
        states.append(tensors(saved(tmp_path / str(cpu_graph))))
    assert all(torch.equal(states[0][path], states[1][path]) for path in states[0])


@pytest.mark.parametrize("step", [2, WARM_UP + 1, 7])
def test_nan_ends_the_run_at_its_step(tmp_path, step):
    trainer = trainer_in(tmp_path)
    poison(trainer, step, "generator", 0)
    with warnings.catch_warnings(), pytest.raises(
        TrainingError, match=rf"^step {step}: the loss of the discriminator is nan; .*: generator"
    ):
        warnings.simplefilter("error")
        trainer.train()
    assert trainer.step == step - 1


def test_a_signal_ends_a_run_of_repeated_steps(tmp_path):
    trainer = trainer_in(tmp_path)
    interrupt(trainer, 7)
    with pytest.raises(SystemExit):
        trainer.train()
    assert trainer.graph.captured and saved(tmp_path)["step"] == 7


# ---- what is changed between two steps


def freeze(trainer):
    next(trainer.networks["discriminator"].parameters()).requires_grad_(False)


def other_optimizer_state(trainer):
    state = copy.deepcopy(trainer.optimizers["generator"].state_dict())
    for moments in state["state"].values():
        moments["exp_avg"].mul_(0.5)
    trainer.optimizers["generator"].load_state_dict(state)


def other_betas(trainer):
    trainer.optimizers["generator"].param_groups[0]["betas"] = (0.1, 0.9)


def assigned_weights(trainer):
    network = trainer.networks["generator"]
    network.load_state_dict({name: tensor.clone() * 0.5 for name, tensor in network.state_dict().items()}, assign=True)


def weights_in_other_memory(trainer):
    for parameter in trainer.networks["generator"].parameters():
        parameter.data = parameter.data * 0.5


def other_momentum(trainer):
    for module in trainer.networks["generator"].modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.5


def evaluation_mode(trainer):
    trainer.networks["generator"].eval()


def other_loss(trainer):
    trainer.objective.kind = "hinge"


def other_objective(trainer):
    trainer.objective = Objective("least_squares")


def other_layer(trainer):
    generator = trainer.networks["generator"]
    name, layer = next((name, module) for name, module in generator.named_modules() if isinstance(module, nn.ConvTranspose2d))
    parent, _, last = name.rpartition(".")
    setattr(generator.get_submodule(parent), last, copy.deepcopy(layer))


def other_memory_format(trainer):
    trainer.networks["generator"].to(memory_format=torch.channels_last)


def other_augmentation(trainer):
    trainer.objective.augment = lambda images: images * 0.5


def new_hook(trainer):
    next(trainer.networks["discriminator"].children()).register_forward_hook(lambda module, inputs, output: output * 0.5)


def steps_of(trainer, change, at):
    """The state after 14 steps, before those in `at` of which something is changed."""
    torch.manual_seed(3)
    batches = [batch for epoch in range(3) for batch in trainer.batches.epoch(epoch)][:14]
    for batch in batches:
        if trainer.step in at:
            change(trainer)
        trainer.train_step(batch)
        trainer.step += 1
    trainer.save()
    return tensors(saved(trainer.output))


@pytest.mark.parametrize("change", [
    freeze, other_optimizer_state, other_betas, assigned_weights, weights_in_other_memory, other_momentum, evaluation_mode, other_loss,
    other_objective, other_layer, other_memory_format, other_augmentation, new_hook,
])  # fmt: skip
def test_what_is_changed_between_two_steps_counts(tmp_path, change):
    eager, recorded = (trainer_in(tmp_path / str(on), DCGANConfig, cpu_graph=on) for on in (False, True))
    expected, found = (steps_of(trainer, change, at=(8,)) for trainer in (eager, recorded))
    unchanged = steps_of(trainer_in(tmp_path / "unchanged", DCGANConfig), change, at=())
    assert recorded.graph.captured and recorded.graph.fallback is None
    assert expected.keys() == found.keys() and all(torch.equal(expected[path], found[path]) for path in expected)
    same = unchanged.keys() == found.keys() and all(torch.equal(unchanged[path], found[path]) for path in found)
    assert not same or change in (other_layer, other_memory_format)


class Counting(Objective):
    """The generator's loss counts twice in every third step."""

    def __init__(self, count=0):
        super().__init__()
        self.count = count

    def generator_loss(self, discriminator, batch, fake):
        self.count += 1
        loss, figures = super().generator_loss(discriminator, batch, fake)
        return loss * (2.0 if self.count % 3 == 0 else 1.0), figures


class Keeping(Objective):
    """Keeps what a step has made, and modules of unusual kinds."""

    def __init__(self):
        super().__init__()
        self.judge = torch.jit.script(nn.Linear(2, 2))
        self.judge_of_judges = nn.Sequential(nn.Linear(2, 2))
        self.judge_of_judges[0].__dict__["parent"] = self.judge_of_judges
        self.last = 0.5

    def generator_loss(self, discriminator, batch, fake):
        loss, figures = super().generator_loss(discriminator, batch, fake)
        self.last = fake.detach(), loss.detach()
        return loss, figures


def test_what_a_step_keeps_is_no_change(tmp_path):
    eager, recorded = (trainer_in(tmp_path / str(on), DCGANConfig, cpu_graph=on) for on in (False, True))
    for trainer in (eager, recorded):
        trainer.objective = Keeping()
    expected, found = (steps_of(trainer, None, at=()) for trainer in (eager, recorded))
    assert recorded.graph.captured and all(torch.equal(expected[path], found[path]) for path in expected)


def test_an_objective_that_comes_later_is_asked_too_whether_it_can_be_recorded(tmp_path):
    def refusing(trainer):
        trainer.objective = Objective()
        trainer.objective.no_recording = "it counts"

    trainer = trainer_in(tmp_path, DCGANConfig)
    with pytest.warns(RuntimeWarning, match="the steps run without a recording: the capture failed: it counts"):
        steps_of(trainer, refusing, at=(8,))
    assert not trainer.graph.captured


@pytest.mark.parametrize("objective, change, at, reason", [
    (Objective, other_optimizer_state, range(4, 14), r"Adam\.\w+ changes again and again"),
    (Counting, other_betas, (), r"Counting\.count changes in a step"),
    (lambda: Counting(np.int64(0)), other_betas, (), r"Counting\.count changes in a step"),
])  # fmt: skip
def test_a_step_that_changes_every_time_stays_eager_and_says_why(tmp_path, capsys, objective, change, at, reason):
    eager, recorded = (trainer_in(tmp_path / str(on), DCGANConfig, cpu_graph=on) for on in (False, True))
    for trainer in (eager, recorded):
        trainer.objective = objective()
    expected, found = (steps_of(trainer, change, at) for trainer in (eager, recorded))
    assert not recorded.graph.captured and re.fullmatch(reason, recorded.graph.fallback)
    assert f"the steps run without a recording: {recorded.graph.fallback}\n" in capsys.readouterr().out
    assert all(torch.equal(expected[path], found[path]) for path in expected)


# ---- what cannot be repeated


class Reading(Objective):
    def generator_loss(self, discriminator, batch, fake):
        return super().generator_loss(discriminator, batch, fake)[0] * (1 + fake.mean().item()), {}


class Progressing(Objective):
    def generator_loss(self, discriminator, batch, fake):
        # Only late in the run: no trial on other values would notice.
        return super().generator_loss(discriminator, batch, fake)[0] * (1 + max(0.0, self.progress - 0.9)), {}


class Leaving(Objective):
    """By memory that PyTorch does not see, as of another library."""

    def generator_loss(self, discriminator, batch, fake):
        factor = torch.from_numpy(batch.images.numpy().mean((1, 2, 3))).mean()  # the same for the batch in any order
        return super().generator_loss(discriminator, batch, fake)[0] * (1 + factor), {}


@pytest.mark.parametrize("objective, reason", [
    (Reading, "the host reads a value, by aten._local_scalar_dense.default"),
    (Progressing, "the objective reads the progress of the run"),
    (Leaving, "repeated, the step gave other numbers than the step itself"),
])  # fmt: skip
def test_a_step_that_cannot_be_repeated_stays_eager_and_says_why(tmp_path, objective, reason):
    plain, trainer = trainer_in(tmp_path / "eager", cpu_graph=False), trainer_in(tmp_path / "recorded")
    for each in (plain, trainer):
        each.objective = objective()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for each in (plain, trainer):
            torch.manual_seed(1)
            each.train()
    expected = f"the steps run without a recording: the capture failed: {reason}"
    assert [str(warning.message) for warning in caught if "recording" in str(warning.message)] == [expected]
    assert trainer.graph.fallback and not trainer.graph.captured
    assert_same_run(tmp_path / "recorded", tmp_path / "eager")


@pytest.mark.parametrize("config_class, settings", [
    (CatGANConfig, {"marginal_weight": 2.0}), (GANConfig, {"cpu_graph": False}),
    (GANConfig, {"hidden_features": 1000, "digit": None}),
], ids=str)  # fmt: skip
def test_where_nothing_is_recorded(tmp_path, config_class, settings):
    assert trainer_in(tmp_path, config_class, **settings)._graph_recorder() is None


# ---- the recorder itself


def captured(function, inputs, parameters=()):
    recorder = CPURecorder(parameters, types.SimpleNamespace(objective=Objective()))
    return recorder, recorder.capture(function, inputs)


def test_capture_computes_nothing_and_replay_everything():
    torch.manual_seed(0)
    x, state, weight = torch.randn(6, 4), torch.zeros(4), nn.Parameter(torch.randn(3, 4))
    halves = torch.empty(6, 2).fill_(2.0)

    def work():
        weight.grad = None
        noisy = x + torch.randn_like(x)
        rows = noisy[1:]
        rows.mul_(2)  # a view in place
        first, _ = noisy.split(2, 1)
        halves[:, 1:].copy_(first[:, :1])
        loss = F.linear(torch.cat([noisy, x]), weight).square().sum()
        loss.backward()
        state.add_(weight.grad.sum(0))
        return torch.stack([loss.detach(), halves.sum(), noisy.view(-1)[3], F.embedding(torch.tensor([1]), weight)[0, 2].detach()])

    before, random = [t.clone() for t in (x, state, halves)], torch.get_rng_state()
    recorder, values = captured(work, [x], [weight])
    assert all(map(torch.equal, before, (x, state, halves))) and torch.equal(torch.get_rng_state(), random)
    assert recorder._trainer.objective.progress == 0.0  # which can be read again
    gradient = weight.grad
    for seed in (1, 2):
        x.copy_(torch.randn(6, 4))
        start = state.clone(), halves.clone()
        torch.manual_seed(seed)
        recorder.replay()
        found = [t.clone() for t in (values, gradient, state, halves)]
        state.copy_(start[0]), halves.copy_(start[1])
        torch.manual_seed(seed)
        assert all(map(torch.equal, found, (work(), weight.grad, state, halves)))
        assert recorder.fetch(values)() == values.tolist()


def test_a_failed_capture_changes_nothing():
    x, state = torch.randn(6), torch.zeros(6)

    def work():
        torch.randn(3)
        state.add_(x)
        if state.sum() > 0:
            return state.sum()
        return x.sum()

    before, random = x.clone(), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="the host reads a value, by aten"):
        captured(work, [x])
    assert torch.equal(state, torch.zeros(6)) and torch.equal(x, before) and torch.equal(torch.get_rng_state(), random)


def no_folder():
    raise FileNotFoundError(2, "No usable temporary directory found")


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("room", [None, 0, 30])
def test_a_state_without_room_in_a_file_is_kept_in_memory(monkeypatch, room, fails):
    states = [torch.full((4,), float(i)) for i in range(4)]  # 16 bytes each

    def work():
        for state in states:
            state.add_(x.sum())
        return states[0].sum() * (x[0].item() if fails else 1.0)

    x, before, limits = torch.randn(3), [state.clone() for state in states], resource.getrlimit(resource.RLIMIT_FSIZE)
    if room is None:
        monkeypatch.setattr(tempfile, "TemporaryFile", lambda *_, **__: no_folder())
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(RuntimeError, match="the host reads a value") if fails else contextlib.nullcontext():
            captured(work, [x])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert all(map(torch.equal, states, before))


def test_an_error_in_a_replay_leaves_tensors_that_can_be_read():
    x, labels, weight = torch.randn(6, 4), torch.arange(6) % 4, nn.Parameter(torch.randn(4, 4))

    def work():
        weight.grad = None
        loss = F.cross_entropy(x @ weight, labels)
        loss.backward()
        return loss.detach()

    recorder, value = captured(work, [x, labels], [weight])
    recorder.replay()
    assert torch.equal(value, work())
    labels[0] = 7
    with pytest.raises(IndexError, match="Target 7 is out of bounds"):
        recorder.replay()
    assert weight.grad.isfinite().all() and value.isfinite()
    labels[0] = 0
    recorder.replay()
    assert torch.equal(value, work())
