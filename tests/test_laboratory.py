import contextlib
import fcntl
import itertools
import json
import math
import os
import signal
import sys

import pytest
import torch
from PIL import Image
from scipy import stats
from torch import nn

from fastgan.cli import main
from fastgan.laboratory import LaboratoryConfig, Mixture, command, distances, gradient_norms, run, train
from fastgan.laboratory.networks import Adam, StackedMLP

GAUSSIAN = Mixture((3.0,), (0.5,))


def stack(widths=(1, 11, 11, 1), copies=3):
    return StackedMLP(list(widths), copies, 1.0, torch.Generator().manual_seed(0))


def test_handwritten_gradients_are_those_of_autograd():
    network = stack()
    x = torch.randn(3, 1, 20, requires_grad=True)
    flat = network.parameters.clone().requires_grad_()
    output, layers = x, network._views(flat)
    for number, (weight, bias) in enumerate(layers):
        output = torch.baddbmm(bias, weight, output)
        output = output.tanh() if number < len(layers) - 1 else output
    incoming = torch.randn_like(output)
    expected = torch.autograd.grad(output, (x, flat), incoming)
    torch.testing.assert_close(network.forward(x.detach()), output.detach())
    found = network.backward(incoming, input=True)
    torch.testing.assert_close((found, network.gradients), expected)


def test_backward_without_weights_leaves_their_gradients_alone():
    network = stack()
    network.gradients.fill_(7)
    network.forward(torch.randn(3, 1, 5))
    network.backward(torch.ones(3, 1, 5), weights=False, input=True)
    assert (network.gradients == 7).all()


def test_adam_is_torchs():
    ours = torch.randn(3, 5)
    theirs = nn.Parameter(ours.clone())
    optimizers = Adam(ours, 0.5, 0.9), torch.optim.Adam([theirs], 0.01, (0.5, 0.9))
    for _ in range(5):
        theirs.grad = torch.randn(3, 5)
        optimizers[0].step(theirs.grad, 0.01)
        optimizers[1].step()
    torch.testing.assert_close(ours, theirs.detach())


def test_distances_are_scipys():
    samples = torch.randn(2, 400, dtype=torch.float64) * 0.6 + torch.tensor([[3.0], [3.4]])
    found = distances(samples, GAUSSIAN)
    for k in range(2):
        assert found["ks"][k] == pytest.approx(stats.ks_1samp(samples[k].numpy(), stats.norm(3, 0.5).cdf).statistic, abs=1e-9)
        quantiles = stats.norm(3, 0.5).ppf((torch.arange(400).numpy() + 0.5) / 400)
        assert found["wasserstein"][k] == pytest.approx(stats.wasserstein_distance(samples[k].numpy(), quantiles), abs=2e-3)


def test_jensen_shannon_runs_from_zero_to_log_2():
    data = stats.norm(3, 0.5).ppf((torch.arange(20000).numpy() + 0.5) / 20000)
    both = torch.stack([torch.tensor(data), torch.full((20000,), 50.0, dtype=torch.float64)])
    found = distances(both, GAUSSIAN)["js"]
    assert found[0] < 1e-4
    assert found[1] == pytest.approx(math.log(2), abs=1e-3)


def test_mixture_moments_and_samples():
    mixture = Mixture((-1.0, 2.0), (0.5, 1.0))
    samples = mixture.sample((200000,), torch.Generator().manual_seed(0))
    assert mixture.mean == 0.5 and float(samples.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(samples.std()) == pytest.approx(mixture.std, abs=0.02)
    x = torch.linspace(-8, 9, 5001)
    torch.testing.assert_close(torch.cumulative_trapezoid(mixture.density(x), x), mixture.cumulative(x[1:]), atol=1e-4, rtol=0)


def test_first_seeds_of_a_short_training_move_towards_the_data():
    trained = train(LaboratoryConfig(seeds=4, max_steps=800), frames=4)
    before, after = (distances(samples, GAUSSIAN)["wasserstein"].median() for samples in trained.samples[[0, -1]])
    assert trained.samples.shape == (5, 4, 2000) and after < before / 2


def test_same_seed_same_run():
    first, second, other = (train(LaboratoryConfig(seeds=2, max_steps=20, seed=seed), frames=1).samples for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_minimax_gradient_vanishes_where_the_discriminator_is_sure():
    norms = gradient_norms(LaboratoryConfig(seeds=4, means="30", standardize=False), steps=150)
    assert norms["non_saturating"][-1].median() > 5 * norms["minimax"][-1].median()


def test_command_writes_figures_and_numbers(tmp_path, capsys):
    flags = ["--seeds", "2", "--epochs", "1", "--max-steps", "60", "--means=-1,1", "--stds", "0.2,0.3"]
    assert run([*flags, "--output", str(tmp_path)]) == 0
    for name in ("density.png", "losses.png", "optimal.png", "gradients.png"):
        assert Image.open(tmp_path / name).width > 300
    assert Image.open(tmp_path / "samples.gif").n_frames > 5
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["epoch_0001.png"]
    assert json.loads((tmp_path / "summary.json").read_text())["seeds"] == 2
    assert "of 2 pass" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    last = lines[-1]
    assert last["step"] == 60 and last["epoch"] == 1 and 0 < last["d_real"] < 1 and 0 < last["d_fake"] < 1
    assert lines[0]["images_per_second"] == 0 and all(line["images_per_second"] > 0 for line in lines[1:])


def test_a_second_run_keeps_all_files_of_the_first(tmp_path):
    flags = ["--seeds", "1", "--max-steps", "2", "--output", str(tmp_path)]
    assert run(flags) == 0
    first = {path.name for path in tmp_path.iterdir()}
    assert run(flags) == 0
    assert {path.name for path in (tmp_path / "previous_1").iterdir()} == first


def checkpoint_in(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


TWO_EPOCHS = ["--seeds", "2", "--epochs", "2"]


def leave_pictures_out(monkeypatch):
    """Drawing takes most of a short run's time."""
    for name in ("save_density", "save_curves", "save_evolution", "save_optimal", "save_gradient_norms"):
        monkeypatch.setattr(command.pictures, name, lambda *arguments: None)


def run_to(step, flags, monkeypatch, number=signal.SIGINT):
    """Run, and be interrupted at a step; returns the exit status."""

    def interrupted(config, *, stop, **named):
        return train(config, stop=lambda asked=itertools.count(): next(asked) == step, **named)

    with monkeypatch.context() as context:
        context.setattr(command, "deferred_signals", lambda: contextlib.nullcontext([number]))
        context.setattr(command, "train", interrupted)
        return run(flags)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Checkpoint of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as monkeypatch:
        leave_pictures_out(monkeypatch)
        assert run([*TWO_EPOCHS, "--output", str(folder)]) == 0
    return checkpoint_in(folder)


@pytest.mark.parametrize("stop", [200, 250])
def test_stopped_and_resumed_equals_uninterrupted(tmp_path, monkeypatch, whole, stop):
    leave_pictures_out(monkeypatch)
    assert run([*TWO_EPOCHS, "--output", str(tmp_path), "--max-steps", str(stop)]) == 0
    assert run(["--resume", str(tmp_path / "checkpoint.pt")]) == 0
    parts = checkpoint_in(tmp_path)
    assert whole["step"] == parts["step"] == 400
    for name, value in whole["weights"].items():
        assert torch.equal(value, parts["weights"][name]), name
    assert whole["history"]["steps"] == parts["history"]["steps"] and whole["history"]["steps"][-1] == 400
    assert torch.equal(torch.stack(whole["history"]["samples"]), torch.stack(parts["history"]["samples"]))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(line["images_per_second"] > 0 for line in lines[1:])


def test_an_interrupted_run_leaves_lines_and_pictures_of_what_there_is(tmp_path, monkeypatch, capsys):
    flags = ["--seeds", "1", "--epochs", "2", "--output", str(tmp_path)]
    assert run_to(210, flags, monkeypatch) == 130
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2] == "stopped at step 210 of 400 and saved; to go on:"
    assert [line.split()[1] for line in printed if line.startswith("step ")] == ["200/400", "210/400"]
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 210
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {"epoch_0001.png", "epoch_0002.png"}
    for name in ("losses.png", "density.png", "samples.gif"):
        assert Image.open(tmp_path / name).width > 300
    leave_pictures_out(monkeypatch)
    assert run(["--resume", str(tmp_path)]) == 0
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(0, 401, 20))


def test_a_resumed_run_keeps_the_plan_that_its_first_max_steps_made(tmp_path, monkeypatch, capsys):
    """The learning rates fall over the planned steps."""
    leave_pictures_out(monkeypatch)
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    monkeypatch.setattr("fastgan.laboratory.experiment.STEPS_PER_EPOCH", 2)  # 20 epochs are 40 steps
    flags = ["--seeds", "1", "--batch-size", "4", "--max-steps", "50", "--output"]
    assert run([*flags, str(straight)]) == 0
    assert run_to(30, [*flags, str(parts)], monkeypatch) == 130 and checkpoint_in(parts)["step"] == 30
    state = (parts / "checkpoint.pt").read_bytes()
    assert run(["--resume", str(parts), "--max-steps", "60"]) == 1
    assert "--max-steps must be at most 50, the steps over which" in capsys.readouterr().err
    assert (parts / "checkpoint.pt").read_bytes() == state
    assert run(["--resume", str(parts), "--max-steps", "20"]) == 0
    assert capsys.readouterr().out == "step 30, past the 20 asked for: nothing to train\n"
    assert (parts / "checkpoint.pt").read_bytes() == state
    for steps in ("45", "50"):
        assert run(["--resume", str(parts), "--max-steps", steps]) == 0
    for name, value in checkpoint_in(straight)["weights"].items():
        assert torch.equal(value, checkpoint_in(parts)["weights"][name]), name


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_before_the_first_epoch_saves_and_says_how_to_resume(tmp_path, monkeypatch, number, status, capsys):
    def interrupted(path, content, write_json=command.write_json):
        write_json(path, content)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(command, "write_json", interrupted)
    monkeypatch.setattr(sys, "argv", ["gaussian_gan.py"])
    assert run(["--seeds", "1", "--output", str(tmp_path)]) == status
    resumes = f"stopped at step 0 of 4000 and saved; to go on:\n  python gaussian_gan.py --resume {tmp_path}\n"
    assert capsys.readouterr().out == resumes
    monkeypatch.undo()
    state = checkpoint_in(tmp_path)
    resumed, straight = (train(LaboratoryConfig(seeds=1, max_steps=20), resumed=start) for start in (state, None))
    assert resumed.steps == straight.steps and torch.equal(resumed.samples, straight.samples)


def test_a_folder_that_another_run_writes_to_is_left_alone(tmp_path, capsys):
    (tmp_path / "config.json").write_text("another run's")
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert run(["--seeds", "1", "--max-steps", "2", "--output", str(tmp_path)]) == 1
    os.close(descriptor)
    assert capsys.readouterr().err == f"error: --output {tmp_path}: another run is writing to it\n"
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_run_that_diverges_says_where_and_can_be_resumed(tmp_path, capsys):
    flags = ["--seeds", "3", "--max-steps", "40", "--generator-learning-rate", "1e38"]
    assert run([*flags, "--output", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: step 2: not finite: generator 1 of 3, layer 2 (output)")
    state = checkpoint_in(tmp_path)
    assert state["step"] == 0 and all(weights.isfinite().all() for weights in state["weights"].values())
    assert run(["--resume", str(tmp_path)]) == 1 and capsys.readouterr().err == error


@pytest.mark.parametrize("part, kind", [(0, "weight"), (1, "bias")])
def test_a_value_that_is_not_finite_is_found_in_its_layer_and_copy(part, kind):
    network = stack()
    x = torch.randn(3, 1, 5)
    assert network.first_nonfinite(network.forward(x)) is None
    network.layers[1][part][2] = torch.inf  # tanh hides it from the output
    assert network.first_nonfinite(network.forward(x)) == (2, kind, [2])


def test_weights_whose_sum_overflows_are_finite():
    network = stack()
    network.parameters.fill_(1e37)
    assert network.parameters.sum().isinf() and network.first_nonfinite(network.forward(torch.randn(3, 1, 5))) is None


@pytest.mark.parametrize("flag", ["--dataset", "--data-root", "--image-size=32"])
def test_flags_of_the_image_examples_are_refused_with_the_reason(flag, capsys):
    assert run([flag, "x"]) == 2
    expected = f"error: {flag.partition('=')[0]} means nothing for one-dimensional data: "
    assert capsys.readouterr().err.startswith(expected)
    with pytest.raises(SystemExit) as error:
        main(["train", "gaussian", flag, "x"])
    assert error.value.code == 2 and capsys.readouterr().err.startswith(expected)


@pytest.mark.parametrize("arguments, message", [
    (["--means", "1,2"], "means and stds must be equally many, got 2 and 1"),
    (["--stds", "0"], "stds must be above 0"),
    (["--stds", "nan"], "means and stds must be below 1e18 in size, got (3.0,) and (nan,)"),
    (["--noise-range", "inf"], "--noise-range must be below 1000000.0, got inf"),
    (["--threads", "4294967296"], "--threads must be below 1025, got 4294967296"),
    (["--hidden-features", str(10**14)], "memory ran out"),
    (["--means", "x"], "must be numbers with commas between"),
    (["--seeds", "0"], "--seeds must be at least 1, got 0"),
])
def test_wrong_settings_are_one_line_errors(arguments, message, tmp_path, capsys):
    assert run([*arguments, "--output", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err
