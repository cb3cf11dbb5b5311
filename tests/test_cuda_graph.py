"""The training step in a CUDA graph: its logic on the CPU with a stand-in for the graph, and itself where there is a GPU."""

import contextlib
import os
import signal
from pathlib import Path

import pytest
import torch
from run_files import metrics, tensors
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastgan.data import Batch, ImageDataset
from fastgan.train import CatGANConfig, DCGANConfig, GANConfig, Objective, Trainer, TrainingError, graph
from fastgan.train.averaging import RampedAverage
from fastgan.train.checkpoint import load_checkpoint
from fastgan.train.graph import WARM_UP, CUDARecorder, GraphedStep, with_rate_on_device

pytestmark = pytest.mark.usefixtures("same_thread_count_after_the_test")

# 40 images in batches of 8: an epoch has 5 steps.
DATASET = ImageDataset(
    "noise", torch.randint(0, 256, (40, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)),
    torch.arange(40) % 10,
)  # fmt: skip
DCGAN = dict(image_size=16, channels=1, batch_size=8, base_channels=4, latent_dim=5, epochs=4, log_every=1, threads=1)
STEPS = 20


def trainer_in(folder, config_class=DCGANConfig, checkpoint=None, **settings):
    settings = {**(DCGAN if config_class is DCGANConfig else {}), "device": "cpu", "cpu_graph": False, **settings}
    return Trainer(config_class(output=str(folder), **settings), DATASET, checkpoint)


def saved(folder):
    return load_checkpoint(Path(folder) / "checkpoint.pt")


def figures(folder):
    return [{**record, "images_per_second": 0} for record in metrics(folder)]


def assert_same_run(one, other):
    """Bit-identical checkpoints and figures of two folders."""
    a, b = tensors(saved(one)), tensors(saved(other))
    assert a.keys() == b.keys() and len(a) > 10
    assert [path for path in a if not torch.equal(a[path], b[path])] == []
    assert figures(one) == figures(other)


def poison(trainer, step, network="generator", layer=3):
    """Put a NaN into a weight before a step."""
    train_step = trainer.train_step

    def poisoned(batch):
        if trainer.step + 1 == step:
            with torch.no_grad():
                trainer.networks[network].main[layer].weight[0] = float("nan")
        return train_step(batch)

    trainer.train_step = poisoned


def interrupt(trainer, step):
    """Send the process SIGTERM before a step."""
    train_step = trainer.train_step

    def interrupted(batch):
        if trainer.step + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(batch)

    trainer.train_step = interrupted


# --- the logic, on the CPU


class StandIn:
    """In place of CUDARecorder: the capture computes nothing in the end, a replay calls the function again and fills what the
    capture returned."""

    name, draws_on_cpu, behind = CUDARecorder.name, CUDARecorder.draws_on_cpu, CUDARecorder.behind

    def __init__(self, trainer, waits=(), failure=None):
        self.trainer, self.waits, self.failure = trainer, list(waits), failure
        self.captures = self.replays = self.rehearsals = 0

    def warm_up(self):
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def rehearse(self):
        self.rehearsals += 1
        yield self.waits

    def capture(self, function, inputs):
        self.captures += 1
        state = {part: getattr(self.trainer, part) for part in ("networks", "optimizers")}
        state = tensors({part: {n: item.state_dict() for n, item in items.items()} for part, items in state.items()})
        before, random = {path: tensor.clone() for path, tensor in state.items()}, torch.get_rng_state()
        try:
            self.outputs = function()
            if self.failure:
                raise self.failure
        finally:
            for path, tensor in state.items():
                tensor.copy_(before[path])
            torch.set_rng_state(random)
        self.function = function
        return self.outputs

    def forget(self):
        self.function = None

    def replay(self):
        self.replays += 1
        self.outputs.copy_(self.function())

    def fetch(self, values):
        return values.clone().tolist


def graphed(trainer, **options):
    stand_in = StandIn(trainer, **options)
    trainer.graph = GraphedStep(
        trainer._update, trainer.optimizers.values(), trainer.device, trainer._nonfinite, stand_in, trainer.graph._reads
    )
    return stand_in


@pytest.mark.parametrize("settings", [
    {}, {"discriminator_steps": 2}, {"ema": 0.0}, {"decay": 0.5}, {"precision": "bf16"}, {"spectral_norm": True},
], ids=str)  # fmt: skip
def test_replayed_run_equals_the_eager_one_to_the_bit(tmp_path, settings):
    trainer_in(tmp_path / "eager", **settings).train()
    trainer = trainer_in(tmp_path / "graph", **settings)
    stand_in = graphed(trainer)
    trainer.train()
    assert_same_run(tmp_path / "graph", tmp_path / "eager")
    assert trainer.graph.captured and trainer.graph.fallback is None
    assert (stand_in.rehearsals, stand_in.captures) == (1, 1) and stand_in.replays == trainer.total_steps - WARM_UP


@pytest.mark.parametrize("stop", [1, WARM_UP, WARM_UP + 1, 9])
def test_resumed_run_warms_up_anew_and_equals_the_uninterrupted_one(tmp_path, stop):
    for name, steps in (("whole", None), ("part", stop)):
        trainer = trainer_in(tmp_path / name, max_steps=steps)
        graphed(trainer)
        trainer.train()
    rest = trainer_in(tmp_path / "part", checkpoint=saved(tmp_path / "part"), resume=str(tmp_path / "part"))
    stand_in = graphed(rest)
    rest.train()
    assert stand_in.replays == STEPS - stop - WARM_UP
    assert_same_run(tmp_path / "part", tmp_path / "whole")


def test_captured_step_reads_static_buffers_and_returns_figures_of_its_own(tmp_path):
    trainer = trainer_in(tmp_path)
    seen, update = [], trainer._update

    def watched(batch, latents):
        latents = list(latents)
        seen.append((batch.images.data_ptr(), latents[0].data_ptr()))
        return update(batch, latents)

    trainer._update = watched
    graphed(trainer)
    figures = []
    for batch in [*trainer.batches.epoch(0), *trainer.batches.epoch(1)]:
        figures.append(trainer.train_step(batch))
        trainer.step += 1
    assert len(set(seen[WARM_UP:])) == 1 and seen[-1] not in seen[:WARM_UP]
    assert len({figure["loss_d"].item() for figure in figures}) == len(figures)


def test_batch_of_another_shape_runs_eagerly_and_the_graph_goes_on(tmp_path):
    plain, trainer = trainer_in(tmp_path / "plain"), trainer_in(tmp_path / "graph")
    stand_in = graphed(trainer)
    batches = [*trainer.batches.epoch(0), *trainer.batches.epoch(1)]
    batches[6] = Batch(batches[6].images[:5], batches[6].labels[:5])
    random = torch.get_rng_state()
    for each in (plain, trainer):
        torch.set_rng_state(random)
        losses = []
        for batch in batches:
            losses.append(each.train_step(batch)["loss_g"].item())
            each.step += 1
        each.save()
    assert stand_in.replays == len(batches) - WARM_UP - 1
    a, b = (tensors(saved(tmp_path / name)) for name in ("plain", "graph"))
    assert all(torch.equal(a[path], b[path]) for path in a)


@pytest.mark.parametrize("step", [2, WARM_UP, WARM_UP + 1, 7, 10], ids="step {}".format)
@pytest.mark.parametrize("network, layer", [("generator", 3), ("discriminator", 2)])
def test_nan_stops_the_run_by_step_network_and_layer_and_is_not_saved(tmp_path, step, network, layer):
    trainer = trainer_in(tmp_path, log_every=100)
    graphed(trainer)
    poison(trainer, step, network, layer)
    message = rf"^step {step}: the loss of the discriminator is nan; .*: {network}.* layer main\.{layer} "
    with pytest.raises(TrainingError, match=message):
        trainer.train()
    # Of the end of the epoch before: the NaN of step 10 was found before step 10 was saved.
    state = saved(tmp_path)
    assert state["step"] == (step - 1) // 5 * 5
    assert all(tensor.isfinite().all() for tensor in tensors(state["networks"]).values())


def test_no_weight_and_no_moment_takes_a_step_on_a_loss_that_is_not_finite(tmp_path):
    trainer = trainer_in(tmp_path)
    graphed(trainer)
    trainer.graph._reads = tuple  # that the loss is another one then is not to be seen
    *batches, last = trainer.batches.epoch(0)
    for batch in batches:
        trainer.train_step(batch)
        trainer.step += 1
    for loss in (float("nan"), float("inf")):
        weight = next(trainer.networks["generator"].parameters())
        trainer.objective.generator_loss = lambda *_, w=weight, loss=loss: (w.sum() * 0 + loss, {})
        generator = trainer.optimizers["generator"]
        before = {path: tensor.clone() for path, tensor in tensors(generator.state_dict()).items()}
        weights = [p.detach().clone() for p in trainer.networks["generator"].parameters()]
        trainer.train_step(last)
        with pytest.raises(TrainingError, match=f"^step 5: the loss of the generator is {loss}; .*: the loss itself"):
            trainer.graph.check()
        assert all(torch.equal(tensor, before[path]) for path, tensor in tensors(generator.state_dict()).items())
        assert all(map(torch.equal, weights, trainer.networks["generator"].parameters()))
        assert not hasattr(generator, "found_inf")


def test_a_signal_ends_a_run_of_replays(tmp_path):
    trainer = trainer_in(tmp_path)
    graphed(trainer)
    interrupt(trainer, 7)
    with pytest.raises(SystemExit):
        trainer.train()
    assert saved(tmp_path)["step"] == 7


class Drawing(Objective):
    """Draws random numbers beside the latent ones."""

    def discriminator_losses(self, discriminator, batch, fake):
        return super().discriminator_losses(discriminator, Batch(batch.images + torch.randn_like(batch.images), None), fake)


@pytest.mark.parametrize("options, objective, reason", [
    ({"waits": ["model.py:7"]}, Objective(), "the host waits for the device in model.py:7"),
    ({}, Drawing(), "random numbers are drawn on the CPU in the step"),
], ids=["waits", "draws"])  # fmt: skip
def test_step_a_graph_could_not_repeat_stays_eager_and_says_why_once(tmp_path, options, objective, reason, capsys):
    plain, trainer = trainer_in(tmp_path / "plain"), trainer_in(tmp_path / "graph")
    stand_in = graphed(trainer, **options)
    for each in (plain, trainer):
        torch.manual_seed(1)
        each.objective = objective
        each.train()
    assert trainer.graph.fallback == reason and stand_in.captures == 0
    assert capsys.readouterr().out.count(f"the steps run without a CUDA graph: {reason}\n") == 1
    assert_same_run(tmp_path / "graph", tmp_path / "plain")


@pytest.mark.parametrize("updates", [1, 2])
def test_random_numbers_of_the_device_are_captured_where_their_order_stays(tmp_path, updates, monkeypatch):
    monkeypatch.setattr(graph, "random_state", lambda device: {"cpu": torch.zeros(1), "cuda": torch.get_rng_state()})
    trainer = trainer_in(tmp_path / "graph", discriminator_steps=updates)
    graphed(trainer)
    trainer.objective = Drawing()
    trainer.train()
    assert trainer.graph.captured == (updates == 1)
    assert trainer.graph.fallback == (
        None if updates == 1 else "random numbers are drawn between the updates of the discriminator"
    )


def test_failed_capture_is_one_warning_and_the_run_goes_on_as_without(tmp_path):
    plain, trainer = trainer_in(tmp_path / "plain"), trainer_in(tmp_path / "graph")
    stand_in = graphed(trainer, failure=RuntimeError("CUDA error: operation not permitted\nCompile with ..."))
    torch.manual_seed(1)
    plain.train()
    torch.manual_seed(1)
    with pytest.warns(RuntimeWarning) as caught:
        trainer.train()
    expected = "the steps run without a CUDA graph: the capture failed: CUDA error: operation not permitted"
    assert [str(warning.message) for warning in caught] == [expected]
    assert stand_in.captures == 1 and not trainer.graph.captured
    assert all(parameter.requires_grad for network in trainer.networks.values() for parameter in network.parameters())
    assert not trainer.optimizers["generator"].param_groups[0]["capturable"]
    assert_same_run(tmp_path / "graph", tmp_path / "plain")


def test_trainer_says_why_it_asks_for_no_graph(tmp_path, capsys):
    trainer = trainer_in(tmp_path)
    assert trainer._graph_recorder() is None and capsys.readouterr().out == ""
    trainer.device = torch.device("cuda")
    trainer.config.cuda_graph = False
    assert trainer._graph_recorder() is None and capsys.readouterr().out == ""
    trainer.config.cuda_graph, trainer.config.precision = True, "fp16"
    assert trainer._graph_recorder() is None and "the scale of fp16's gradients" in capsys.readouterr().out
    trainer.config.precision, trainer.objective.no_graph = "fp32", "of a reason"
    assert trainer._graph_recorder() is None
    assert capsys.readouterr().out == "the steps run without a CUDA graph: of a reason\n"


def test_step_size_in_a_tensor_is_changed_in_place_and_saved_as_a_number():
    def stepped(optimizer, weight):
        weight.grad = torch.ones_like(weight)
        optimizer.step()

    weights = [nn.Parameter(torch.ones(3)) for _ in range(3)]
    plain = torch.optim.Adam([weights[0]], lr=0.5, fused=True)
    on_device = with_rate_on_device(torch.optim.Adam([weights[1]], lr=torch.tensor(0.5), fused=True))
    rate = on_device.param_groups[0]["lr"]
    for value in (0.5, 0.25):
        for optimizer, weight in ((plain, weights[0]), (on_device, weights[1])):
            graph.set_rate(optimizer, value)
            stepped(optimizer, weight)
    assert on_device.param_groups[0]["lr"] is rate and rate.item() == 0.25
    state = on_device.state_dict()
    assert state["param_groups"] == plain.state_dict()["param_groups"] and type(state["param_groups"][0]["lr"]) is float
    # Either way round.
    other = with_rate_on_device(torch.optim.Adam([weights[2]], lr=torch.tensor(0.5), fused=True))
    other.load_state_dict(plain.state_dict())
    assert isinstance(other.param_groups[0]["lr"], torch.Tensor) and other.param_groups[0]["lr"].item() == 0.25
    plain.load_state_dict(state)
    assert plain.param_groups[0]["lr"] == 0.25
    with torch.no_grad():
        weights[2].copy_(weights[0])
    stepped(plain, weights[0])
    stepped(other, weights[2])
    assert torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("change", [{"params": [0]}, None], ids=["fewer parameters", "one group more"])
def test_a_state_the_optimizer_refuses_leaves_its_step_size(change):
    optimizer = graph.adam([nn.Parameter(torch.ones(3)) for _ in range(2)], 0.5, (0.5, 0.9), torch.device("cpu"))
    state = optimizer.state_dict()
    (group,) = state["param_groups"]
    group["lr"] = 5.0
    state["param_groups"] = [group | change] if change else [group, group]
    with pytest.raises(ValueError, match="loaded state dict"):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"].item() == 0.5


def test_average_is_that_of_averaged_model():
    def ramped(averaged, current, count):
        get_ema_multi_avg_fn(min(0.9, (1 + int(count)) / (10 + int(count))))(averaged, current, count)

    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    expected, found = AveragedModel(network, multi_avg_fn=ramped, use_buffers=True), RampedAverage(network, 0.9)
    for _ in range(100):
        network(torch.randn(2, 3, 8, 8))
        with torch.no_grad():
            network[0].weight.add_(torch.randn_like(network[0].weight))
        expected.update_parameters(network)
        found.update_parameters(network)
    expected, found = expected.state_dict(), found.state_dict()
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)


# --- the graph itself


@pytest.fixture
def cuda(monkeypatch):
    """A GPU whose results can be compared to the bit."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def cuda_run(folder, config_class=DCGANConfig, **settings):
    trainer = trainer_in(folder, config_class, device="cuda", **settings)
    trainer.train()
    return trainer


@pytest.mark.parametrize("settings", [
    {}, {"precision": "bf16", "ema": 0.0}, {"decay": 0.5, "learning_rate": 1e-2}, {"discriminator_steps": 2}, {"augment": True},
    {"gradient_penalty": 10.0, "generator_loss": "wasserstein"}, {"r1": 1.0}, {"spectral_norm": True}, {"fuse": False},
], ids=str)  # fmt: skip
def test_cuda_graph_run_equals_the_eager_run(tmp_path, cuda, settings):
    captured = cuda_run(tmp_path / "graph", **settings)
    eager = cuda_run(tmp_path / "eager", cuda_graph=False, **settings)
    assert captured.graph.fallback is None and captured.graph.captured and not eager.graph.captured
    a, b = (tensors(saved(tmp_path / name)) for name in ("graph", "eager"))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for one, other in zip(figures(tmp_path / "graph"), figures(tmp_path / "eager"), strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-6)


def test_cuda_graph_runs_the_gan_of_perceptrons(tmp_path, cuda):
    settings = dict(image_size=16, batch_size=2, latent_dim=5, hidden_features=20, max_steps=12, epochs=10, log_every=1)
    captured = cuda_run(tmp_path / "graph", GANConfig, **settings)
    cuda_run(tmp_path / "eager", GANConfig, cuda_graph=False, **settings)
    assert captured.graph.captured
    a, b = (tensors(saved(tmp_path / name)) for name in ("graph", "eager"))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stop", [2, 9])
def test_cuda_graph_run_resumes_to_the_bit(tmp_path, cuda, stop):
    cuda_run(tmp_path / "whole", ema=0.9)
    cuda_run(tmp_path / "part", ema=0.9, max_steps=stop)
    rest = cuda_run(tmp_path / "part", ema=0.9, checkpoint=saved(tmp_path / "part"), resume=str(tmp_path / "part"))
    assert rest.graph.captured
    assert_same_run(tmp_path / "part", tmp_path / "whole")


def test_cuda_graph_sees_the_step_size_change(tmp_path, cuda):
    trainer = trainer_in(tmp_path, device="cuda", decay=0.5, learning_rate=1e-3)
    batches = [batch for epoch in range(4) for batch in trainer.batches.epoch(epoch)]
    sizes = []
    for batch in batches:
        before = trainer.networks["generator"].main[0].weight.detach().clone()
        trainer.train_step(batch)
        sizes.append((trainer.networks["generator"].main[0].weight - before).norm().item())
        trainer.step += 1
    assert trainer.graph.captured and sizes[-1] < 0.5 * sizes[9]
    assert trainer.optimizers["generator"].param_groups[0]["lr"].item() == pytest.approx(1e-4)
    trainer.save()
    assert saved(tmp_path)["optimizers"]["generator"]["param_groups"][0]["lr"] == pytest.approx(1e-4)


@pytest.mark.parametrize("step", [WARM_UP, 7, 10], ids="step {}".format)
def test_cuda_graph_run_is_stopped_by_a_nan(tmp_path, cuda, step):
    trainer = trainer_in(tmp_path, device="cuda", log_every=100)
    poison(trainer, step)
    with pytest.raises(TrainingError, match=rf"^step {step}: the loss of the discriminator is nan; .* generator, layer main\.3 "):
        trainer.train()
    assert saved(tmp_path)["step"] == (step - 1) // 5 * 5
    assert all(parameter.isfinite().all() for parameter in trainer.networks["discriminator"].parameters())


def test_cuda_graph_goes_on_after_a_batch_of_another_shape(tmp_path, cuda):
    losses = []
    for name, wanted in (("graph", True), ("eager", False)):
        trainer = trainer_in(tmp_path / name, device="cuda", cuda_graph=wanted)
        batches = [*trainer.batches.epoch(0), *trainer.batches.epoch(1)]
        batches[6] = Batch(batches[6].images[:5], batches[6].labels[:5])
        figures = []
        for batch in batches:
            figures.append(trainer.train_step(batch))
            trainer.step += 1
        gradients = [parameter.grad for parameter in trainer.networks["generator"].parameters()]
        losses.append([[figure["loss_d"].item(), figure["loss_g"].item()] for figure in figures] + [gradients[0].sum().item()])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)


def test_cuda_graph_replay_does_not_wait_for_the_device(tmp_path, cuda):
    trainer = trainer_in(tmp_path, device="cuda")
    batches = [*trainer.batches.epoch(0), *trainer.batches.epoch(1)]
    for batch in batches[: WARM_UP + 1]:
        trainer.train_step(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches[WARM_UP + 1 :]:
            trainer.train_step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    trainer.graph.check()


class Waiting(Objective):
    """Waits for the device: in every step, or in a capture alone."""

    def __init__(self, always):
        super().__init__()
        self.always = always

    def generator_loss(self, discriminator, batch, fake):
        loss, figures = super().generator_loss(discriminator, batch, fake)
        if self.always or torch.cuda.is_current_stream_capturing():
            loss.item()
        return loss, figures


@pytest.mark.parametrize("always", [True, False], ids=["in every step", "in the capture"])
def test_cuda_run_goes_on_without_a_graph_that_cannot_be_captured(tmp_path, cuda, always):
    runs = {name: trainer_in(tmp_path / name, device="cuda", cuda_graph=name == "graph") for name in ("graph", "eager")}
    for name, trainer in runs.items():
        torch.manual_seed(1)
        trainer.objective = Waiting(always)
        warns = name == "graph" and not always
        with pytest.warns(RuntimeWarning, match="the capture failed") if warns else contextlib.nullcontext():
            trainer.train()
    assert ("the host waits for the device in" if always else "the capture failed") in runs["graph"].graph.fallback
    assert_same_run(tmp_path / "graph", tmp_path / "eager")


def test_cuda_checkpoints_go_to_the_cpu_and_back(tmp_path, cuda):
    for device, stop in (("cuda", 6), ("cpu", 8), ("cuda", 15)):
        state = saved(tmp_path) if (tmp_path / "checkpoint.pt").exists() else None
        resume = {} if state is None else {"checkpoint": state, "resume": str(tmp_path)}
        trainer_in(tmp_path, device=device, max_steps=stop, **resume).train()
        assert saved(tmp_path)["step"] == stop
        group = saved(tmp_path)["optimizers"]["generator"]["param_groups"][0]
        assert type(group["lr"]) is float and group["capturable"] is False


def test_cuda_catgan_says_why_it_has_no_graph(tmp_path, cuda, capsys):
    trainer = trainer_in(tmp_path, CatGANConfig, device="cuda", image_size=16, batch_size=8, labels="0", base_channels=4,
                         max_steps=1)  # fmt: skip
    trainer.train_step(next(trainer.batches.epoch(0)))
    assert "the steps run without a CUDA graph: the CatGAN's loss" in capsys.readouterr().out


def test_cuda_recorder_restores_stream_and_random_numbers_after_a_failure(cuda):
    stream, value = torch.cuda.current_stream(), torch.ones((), device="cuda")
    torch.manual_seed(0)
    expected = torch.randn(4, device="cuda")
    torch.manual_seed(0)
    with pytest.raises(RuntimeError):
        CUDARecorder().capture(lambda: torch.randn(4, device="cuda").sum().item(), [])
    assert torch.cuda.current_stream() == stream
    assert torch.equal(torch.randn(4, device="cuda"), expected) and value.item() == 1
