"""The command `fastgan`."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import fastgan
import fastgan.laboratory
from fastgan.cli import main
from fastgan.data import load_dataset
from fastgan.sample import load_generator, walk
from fastgan.train import CatGANConfig, DCGANConfig, GANConfig, Trainer, run
from fastgan.train.checkpoint import load_checkpoint

TINY = ["--image-size", "8", "--batch-size", "8", "--base-channels", "2", "--latent-dim", "5", "--device", "cpu"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(fastgan.ops.__file__).parents[2])}


def start(*arguments):
    return subprocess.Popen([sys.executable, "-m", "fastgan", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=ENVIRONMENT, start_new_session=True)  # fmt: skip


def usage_error(arguments, capsys):
    """What is printed for wrong arguments, which exit with 2."""
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    return capsys.readouterr().err


def help_of(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        main([*arguments, "--help"])
    assert exit.value.code == 0
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A short run of every family, by its name."""
    folder = tmp_path_factory.mktemp("runs")
    settings = {"max_steps": 2, "device": "cpu", "latent_dim": 5}  # from two on averages differ from weights
    configs = (
        DCGANConfig(image_size=8, base_channels=2, batch_size=8, output=str(folder / "dcgan"), **settings),
        GANConfig(output=str(folder / "gan"), ema=0, **settings),
        CatGANConfig(image_size=8, base_channels=2, batch_size=8, output=str(folder / "catgan"), **settings),
    )
    for config in configs:
        dataset = load_dataset("digits", image_size=config.image_size)
        trainer = Trainer(config, dataset)
        trainer.objective.evaluate = lambda trainer: {}
        trainer.train()
    assert main(["train", "gaussian", "--seeds", "3", "--max-steps", "20", "--output", str(folder / "gaussian")]) == 0
    return folder


# --- help, usage and exit status


def test_help_names_every_command_and_that_of_a_command_its_arguments(capsys):
    printed = help_of([], capsys)
    for command in ("train", "sample", "evaluate", "bench", "info"):
        assert f"\n    {command} " in printed
        assert command == "train" or "--" in help_of([command], capsys)
    printed = help_of(["train"], capsys)
    for family in ("dcgan", "gan", "catgan", "gaussian"):
        assert f"\n    {family} " in printed
        assert "usage: fastgan train " + family in help_of(["train", family], capsys)


def test_help_shows_the_familys_own_settings_before_the_shared_ones(capsys):
    printed = help_of(["train", "dcgan"], capsys)
    own, shared = printed.index("settings of this model family (dcgan)"), printed.index("settings of every model family")
    options = printed.index("options:")
    assert own < printed.index("--base-channels", options) < shared < printed.index("--learning-rate", own)


def test_help_loads_neither_trainer_nor_plotting():
    code = (
        "import contextlib, sys; from fastgan.cli import main\n"
        "with contextlib.suppress(SystemExit): main(['--help'])\n"
        "print(sorted(name for name in ('fastgan.train', 'matplotlib', 'scipy') if name in sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert run.stdout.splitlines()[-1] == "[]", run.stderr


@pytest.mark.parametrize("arguments, message", [
    ([], "arguments are required: COMMAND"),
    (["paint"], "invalid choice: 'paint'"),
    (["train"], "arguments are required: FAMILY"),
    (["train", "vae"], "invalid choice: 'vae'"),
    (["train", "dcgan", "--no-such-flag"], "--no-such-flag"),
    (["sample"], "arguments are required: --checkpoint"),
    (["sample", "--checkpoint", "x", "--grid", "8"], "argument --grid: must be ROWSxCOLUMNS, such as 8x8, got '8'"),
    (["sample", "--checkpoint", "x", "--out", "a.jpg"], "argument --out: must be the name of a .png file, got 'a.jpg'"),
    (["sample", "--checkpoint", "x", "--seed", "4294967296"], "argument --seed: must be an integer of at least 0 and below 2**32"),
    (["bench", "--case", "huge"], "invalid choice: 'huge'"),
])  # fmt: skip
def test_wrong_arguments_exit_with_2(arguments, message, capsys):
    assert message in usage_error(arguments, capsys)


@pytest.mark.parametrize("arguments, message", [
    (["train", "dcgan", "--image-size", "30", "--output", "{tmp}/x"], "image_size must be 4 * 2**n"),
    (["train", "dcgan", "--resume", "{tmp}"], "no checkpoint to resume from"),
    (["train", "dcgan", "--resume", "", "--output", "{tmp}/x"], "--resume must be the folder of a run, got an empty path"),
    (["train", "gaussian", "--output", ""], "--output must be a folder, got an empty path"),
    (["train", "gaussian", "--resume", "", "--output", "{tmp}/x"], "--resume must be the folder of a run, got an empty path"),
    (["sample", "--checkpoint", "{tmp}/none.pt"], "none.pt: no such file"),
    (["sample", "--checkpoint", "{runs}/gan", "--grid", "8x8"], "10 networks side by side"),
    (["sample", "--checkpoint", "{runs}/dcgan", "--out", "{tmp}/no/folder.png"], "folder.png cannot be written"),
    (["evaluate", "{runs}/gaussian"], "family 'gaussian' has no generator of images; dcgan, gan, catgan have"),
    (["train", "dcgan", "--device", "cpu", "--latent-dim", str(10**14), "--output", "{tmp}/x"], "memory ran out"),
    (["train", "gan", "--epochs", str(10**40), "--output", "{tmp}/x"], "--epochs must be below 281474976710656, got 1000"),
    (["sample", "--checkpoint", "{runs}/dcgan", "--grid", "100000000x100000000"], "memory ran out (you tried to allocate"),
    (["export", "--checkpoint", "{runs}/dcgan", "--format", "torch", "--out", "{tmp}"], "--out {tmp}: is a folder; name a file"),
    (["bench", "--repeats", "0"], "--repeats must be at least 1, got 0"),
])  # fmt: skip
def test_errors_are_one_line_and_exit_with_1(arguments, message, tmp_path, runs, capsys):
    assert main([argument.format(tmp=tmp_path, runs=runs) for argument in arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message.format(tmp=tmp_path) in error and error.count("\n") == 1


def test_a_programming_error_keeps_its_traceback(monkeypatch):
    def broken(options):
        raise RuntimeError("a bug")

    monkeypatch.setattr("fastgan.cli._info", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["info"])


def test_interrupt_exits_with_130_and_names_the_command_that_resumes(tmp_path):
    out = tmp_path / "run"
    process = start("train", "dcgan", *TINY, "--log-every", "1", "--output", str(out))
    # Without a terminal a run is silent until ten seconds have passed: its first line of figures tells that it has begun.
    figures = out / "metrics.jsonl"
    while not (figures.exists() and figures.stat().st_size > 0):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.05)
            pytest.fail(f"the run ended early: {process.communicate()}")
    os.kill(process.pid, signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    assert f"-m fastgan train dcgan --resume {out}" in printed
    assert load_checkpoint(out / "checkpoint.pt", "dcgan")["step"] > 0


# --- train


def test_train_is_the_example_under_another_name(tmp_path, capsys):
    example = Path(__file__).parent.parent / "examples" / "train_dcgan.py"
    arguments = [*TINY, "--max-steps", "2", "--threads", "1"]
    threads = torch.get_num_threads()
    try:
        assert main(["train", "dcgan", *arguments, "--output", str(tmp_path / "command")]) == 0
    finally:
        torch.set_num_threads(threads)
    subprocess.run([sys.executable, example, *arguments, "--output", tmp_path / "example"], check=True, env=ENVIRONMENT,
                   capture_output=True)  # fmt: skip
    command, script = (load_checkpoint(tmp_path / name / "checkpoint.pt")["networks"] for name in ("command", "example"))
    for network in command:
        for name, value in command[network].items():
            assert torch.equal(value, script[network][name]), name


def test_a_run_goes_on_under_the_command(runs, capsys):
    checkpoint = str(runs / "dcgan" / "checkpoint.pt")
    assert main(["train", "dcgan", "--resume", checkpoint, "--max-steps", "3", "--channels", "1"]) == 0
    assert "step 3 of 3" in capsys.readouterr().out
    assert main(["train", "dcgan", "--resume", str(runs / "dcgan"), "--max-steps", "2"]) == 0
    assert "step 3, past the 2 asked for: nothing to train" in capsys.readouterr().out


# --- sample


@pytest.mark.parametrize("family, grid, size, cell", [("dcgan", (2, 3), 8, 8), ("gan", (10, 2), 28, 2), ("catgan", (1, 2), 8, 8)])
@pytest.mark.parametrize("more", [[], ["--interpolate"]], ids=["points", "walk"])
def test_sample_draws_a_grid_of_every_family(runs, tmp_path, family, grid, size, cell, more, capsys):
    rows, columns = grid
    arguments = ["sample", "--checkpoint", str(runs / family), "--grid", f"{rows}x{columns}", *more]
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert main([*arguments, "--seed", seed, "--out", str(tmp_path / f"{name}.png")]) == 0
    assert f"{rows} x {columns} images by the {'weights' if family == 'gan' else 'averaged weights'} of step" in (
        capsys.readouterr().out
    )
    pictures = [Image.open(tmp_path / f"{name}.png") for name in "abc"]
    border = 2
    assert pictures[0].size == (cell * (columns * (size + border) + border), cell * (rows * (size + border) + border))
    assert pictures[0].tobytes() == pictures[1].tobytes() != pictures[2].tobytes()


def test_sample_uses_the_averaged_weights_and_needs_no_images(runs, tmp_path, monkeypatch):
    state = load_checkpoint(runs / "dcgan" / "checkpoint.pt")
    monkeypatch.setattr("fastgan.train.config.load_dataset", lambda *_, **__: pytest.fail("the images were read"))
    config, generator = load_generator(runs / "dcgan")
    assert not generator.training and config.latent_dim == 5
    for name, value in generator.state_dict().items():
        assert torch.equal(value, state["averaged"]["generator"][f"module.{name}"])
    assert any(not torch.equal(value, state["networks"]["generator"][name]) for name, value in generator.state_dict().items())


@pytest.mark.parametrize("more", [[], ["--interpolate"]], ids=["histograms", "walk"])
def test_sample_of_the_laboratory_is_a_panel_a_network(runs, tmp_path, more, capsys):
    assert main(["sample", "--checkpoint", str(runs / "gaussian"), "--out", str(tmp_path / "g.png"), *more]) == 0
    assert "of 3 networks" in capsys.readouterr().out and Image.open(tmp_path / "g.png").width > 300


def test_walks_run_from_one_point_to_the_other():
    start, end = torch.randn(2, 4, 100, generator=torch.Generator().manual_seed(0))
    for distribution in ("uniform", "normal"):
        points = walk(start, end, 5, distribution)
        assert points.shape == (4, 5, 100)
        torch.testing.assert_close(points[:, [0, -1]], torch.stack([start, end], 1))
    # Half way a straight line between far points is about 0.7 times as long, the spherical one keeps the length.
    lengths = walk(start, end, 5, "normal").norm(dim=-1)
    assert (lengths.amin(1) > 0.95 * torch.minimum(start.norm(dim=1), end.norm(dim=1))).all()
    assert (walk(start, end, 5, "uniform")[:, 2].norm(dim=-1) < 0.85 * lengths[:, 2]).all()
    assert walk(start, end, 1, "normal").shape == (4, 1, 100)
    assert walk(start, start, 3, "normal").isfinite().all()


# --- info and bench


def test_info_is_build_info_as_lines_and_as_json(capsys):
    assert main(["info"]) == 0
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} == set(fastgan.build_info())
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(fastgan.build_info()))


def test_a_closed_pipe_is_no_traceback():
    process = start("info")
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 1


@pytest.mark.parametrize("module", ["fastgan.train.command.Trainer", "fastgan.laboratory.command.train"])
def test_a_closed_pipe_is_no_traceback_of_an_example(module, tmp_path, monkeypatch, capsys):
    def closed(*_, **__):
        raise BrokenPipeError

    monkeypatch.setattr(module, closed)
    monkeypatch.setattr(sys, "stdout", open(tmp_path / "printed", "w"))
    runs = {"fastgan.train.command.Trainer": lambda flags: run(GANConfig, flags)}.get(module, fastgan.laboratory.run)
    assert runs(["--output", str(tmp_path / "run")]) == 1 and capsys.readouterr().err == ""
    sys.stdout.close()


def test_bench_checks_and_prints_a_ratio(monkeypatch, capsys):
    from fastgan import bench

    case = bench.Case(8, 1, 4, "fp32")
    monkeypatch.setattr(bench, "CASES", [case])
    assert main(["bench", "--case", case.name, "--peers", "eager", "fuse", "trainer", "--repeats", "2"]) == 0
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[1].strip() for row in rows] == ["peer", "eager", "fuse", "trainer"]
    assert rows[1][-2].strip() == "1.00" and float(rows[2][-2]) > 0


def test_bench_refuses_a_peer_that_computes_something_else(monkeypatch):
    from fastgan import bench

    case = bench.Case(8, 1, 4, "fp32")
    monkeypatch.setattr(bench, "CASES", [case])
    monkeypatch.setattr(bench, "fuse", lambda network: network.apply(lambda m: m.register_forward_hook(lambda *a: a[-1] * 1.1)))
    assert main(["bench", "--case", case.name, "--peers", "fuse", "--repeats", "1"]) == 1
