import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import pty
import re
import resource
import shlex
import signal
import stat
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from run_files import metrics, tensors
from torch import nn

from fastgan.data import ImageDataset, load_dataset
from fastgan.train import CatGANConfig, DCGANConfig, GANConfig, Objective, Trainer, TrainingError, run
from fastgan.train.checkpoint import load_checkpoint, write_atomically
from fastgan.train.config import parse_arguments
from fastgan.train.nonfinite import locate_nonfinite
from fastgan.train.outputs import Metrics, save_animation, save_curves, save_grid
from fastgan.train.trainer import Frozen, deferred_signals

pytestmark = pytest.mark.usefixtures("same_thread_count_after_the_test")

EXAMPLE = Path(__file__).parent.parent / "examples" / "train_dcgan.py"
# 40 images of 8 x 8 pixels in batches of 8: an epoch has 5 steps and takes a few hundredths of a second.
TINY = ["--dataset", "folder", "--image-size", "8", "--channels", "1", "--batch-size", "8", "--base-channels", "2",
        "--latent-dim", "5", "--device", "cpu", "--epochs", "4", "--threads", "1", "--ema", "0"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for i in range(40):
        pixels = torch.randint(0, 256, (8, 8), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(folder / f"{i:02d}.png")
    return folder


@pytest.fixture
def tiny(images):
    return [*TINY, "--data-root", str(images)]


def trainer_in(folder, images, **settings):
    config = DCGANConfig(dataset="folder", data_root=str(images), image_size=8, channels=1, batch_size=8,
                         base_channels=2, latent_dim=5, device="cpu", output=str(folder), **{"ema": 0, **settings})
    return Trainer(config, load_dataset("folder", images, image_size=8, channels=1))


def checkpoint(folder):
    return load_checkpoint(Path(folder) / "checkpoint.pt", "dcgan")


def assert_bit_identical(one, other):
    assert one["step"] == other["step"] and one["data"] == other["data"]
    one, other = tensors(one), tensors(other)
    assert one.keys() == other.keys() and len(one) >= 10
    assert [path for path in one if not torch.equal(one[path], other[path])] == []


# --- outputs


def test_a_run_writes_every_promised_file(tmp_path, tiny, capsys):
    out = tmp_path / "deep" / "run"
    assert run(DCGANConfig, [*tiny, "--output", str(out), "--log-every", "2"]) == 0
    grids = sorted(path.name for path in (out / "samples").iterdir())
    assert grids == [f"epoch_000{i}.png" for i in (1, 2, 3, 4)]
    assert Image.open(out / "samples.gif").n_frames == 4
    assert Image.open(out / "losses.png").width > 500
    config = json.loads((out / "config.json").read_text())
    assert config["family"] == "dcgan" and config["base_channels"] == 2 and config["seed"] == 0
    records = metrics(out)
    # Every second step, and the last of every epoch of five.
    assert [record["step"] for record in records] == [2, 4, 5, 6, 8, 10, 12, 14, 15, 16, 18, 20]
    assert records[-1]["epoch"] == 4
    for record in records:
        assert set(record) == {"step", "epoch", "loss_d", "loss_g", "d_real", "d_fake", "images_per_second"}
        assert 0 < record["d_real"] < 1 and 0 < record["d_fake"] < 1 and record["images_per_second"] > 0
    # Without a terminal: plain lines with speed and time left, no progress bar.
    printed = capsys.readouterr()
    assert "it/s" in printed.out and "left" in printed.out and "\r" not in printed.out + printed.err


def test_checkpoint_is_loadable_with_weights_only_and_holds_the_whole_state(tmp_path, tiny):
    assert run(DCGANConfig, [*tiny, "--output", str(tmp_path), "--max-steps", "7", "--ema", "0.9"]) == 0
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["step"] == 7 and (state["data"]["epoch"], state["data"]["position"]) == (1, 2)
    assert set(state["networks"]) == set(state["optimizers"]) == {"generator", "discriminator"}
    assert set(state["averaged"]) == {"generator"}
    assert state["random"]["cpu"].dtype == torch.uint8
    generator, discriminator, _ = DCGANConfig(**state["config"]).build(load_dataset("digits", image_size=8))
    generator.load_state_dict(state["networks"]["generator"])
    discriminator.load_state_dict(state["networks"]["discriminator"])


def test_kept_checkpoints_are_those_of_their_epochs(tmp_path, tiny):
    assert run(DCGANConfig, [*tiny, "--output", str(tmp_path), "--keep-checkpoints", "1,3"]) == 0
    kept = sorted((tmp_path / "checkpoints").iterdir())
    assert [path.name for path in kept] == ["epoch_0001.pt", "epoch_0003.pt"]
    assert [load_checkpoint(path, "dcgan")["step"] for path in kept] == [5, 15]
    assert checkpoint(tmp_path)["step"] == 20


def test_grid_shows_each_image_in_its_place(tmp_path):
    images = torch.full((4, 3, 64, 64), -1.0)
    images[1, 0] = 1
    images[2, 1] = 1
    save_grid(tmp_path / "grid.png", images)
    grid = Image.open(tmp_path / "grid.png")
    assert grid.size == (134, 134)
    assert [grid.getpixel(at) for at in ((30, 30), (100, 30), (30, 100))] == [(0, 0, 0), (255, 0, 0), (0, 255, 0)]
    save_animation(tmp_path / "samples.gif", [tmp_path / "grid.png"])
    assert Image.open(tmp_path / "samples.gif").size == (134, 134)


def test_animation_of_many_epochs_has_a_hundred_frames_at_most_and_ends_with_the_last(tmp_path):
    frames = []
    for i in range(250):
        frames.append(tmp_path / f"{i:03d}.png")
        Image.new("RGB", (4, 4), (i, 0, 0)).save(frames[-1])
    save_animation(tmp_path / "samples.gif", frames)
    with Image.open(tmp_path / "samples.gif") as animation:
        assert 80 <= animation.n_frames <= 100
        animation.seek(animation.n_frames - 1)
        assert abs(animation.convert("RGB").getpixel((0, 0))[0] - 249) < 8


def test_a_damaged_grid_costs_the_animation_a_frame(tmp_path):
    frames = [tmp_path / f"{i}.png" for i in range(3)]
    for i, frame in enumerate(frames):
        Image.new("L", (4, 4), i).save(frame)
    frames[1].write_bytes(frames[1].read_bytes()[:30])
    save_animation(tmp_path / "samples.gif", frames)
    assert Image.open(tmp_path / "samples.gif").n_frames == 2


def test_a_second_run_keeps_the_files_of_the_first(tmp_path, tiny, capsys):
    arguments = [*tiny, "--output", str(tmp_path), "--max-steps", "2"]
    assert run(DCGANConfig, arguments) == 0
    first = checkpoint(tmp_path)
    assert run(DCGANConfig, [*arguments, "--seed", "1"]) == 0
    assert "held an earlier run: moved to" in capsys.readouterr().out
    assert_bit_identical(checkpoint(tmp_path / "previous_1"), first)
    assert checkpoint(tmp_path)["config"]["seed"] == 1


@contextlib.contextmanager
def another_run_in(folder):
    """What the run of another process does to its folder: locks are of a descriptor, not of a process."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("resumes", [False, True], ids=["new", "resumed"])
def test_a_folder_that_another_run_writes_to_is_left_alone(tmp_path, tiny, resumes, capsys):
    arguments = [*tiny, "--output", str(tmp_path), "--max-steps", "1"]
    assert run(DCGANConfig, arguments) == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    capsys.readouterr()
    with another_run_in(tmp_path):
        assert run(DCGANConfig, ["--resume", str(tmp_path), "--max-steps", "2"] if resumes else arguments) == 1
    assert capsys.readouterr().err == f"error: --output {tmp_path}: another run is writing to it\n"
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_folder_is_claimed_until_the_run_ends(tmp_path, images):
    trainer = trainer_in(tmp_path, images, max_steps=1)
    second = trainer_in(tmp_path, images, max_steps=1)  # of the same process

    second.train()
    with pytest.raises(BlockingIOError), another_run_in(tmp_path):
        pass
    trainer.train()
    with another_run_in(tmp_path):
        pass


def test_a_file_system_without_locks_is_written_to(tmp_path, images, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    trainer_in(tmp_path, images)
    assert checkpoint(tmp_path)["step"] == 0


# --- resume


PAGE_FAULTS = """
import resource, sys
import torch
from fastgan.train.allocator import keep_freed_memory

if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit("no mallopt")

def step():
    return [torch.zeros(6_000_000) for _ in range(8)]  # 192 MB

for _ in range(2):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_freed_memory_is_used_again_without_page_faults():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}

    def page_faults(how):
        run = subprocess.run([sys.executable, "-c", PAGE_FAULTS, how], env=environment, capture_output=True, text=True)
        if "no mallopt" in run.stderr:
            pytest.skip("not glibc")
        return int(run.stdout)

    most = page_faults("as it is")  # 46,875 pages a step, or 94 large ones
    # One process of a hundred or so had faults in spite of the setting, on a machine that others shared.
    assert any(page_faults("keep") * 10 < most for _ in range(3))
    asked = {**environment, "MALLOC_TRIM_THRESHOLD_": "1000000"}
    refused = subprocess.run([sys.executable, "-c", PAGE_FAULTS, "keep"], env=asked, capture_output=True, text=True)
    assert "no mallopt" in refused.stderr  # the environment's word counts


def test_same_seed_same_run_other_seed_other_run(tmp_path, tiny):
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        run(DCGANConfig, [*tiny, "--output", str(tmp_path / name), "--max-steps", "6", "--seed", seed])
    assert_bit_identical(checkpoint(tmp_path / "a"), checkpoint(tmp_path / "b"))
    weight = "main.0.weight"
    a, c = (checkpoint(tmp_path / name)["networks"]["generator"][weight] for name in "ac")
    assert not torch.equal(a, c)


@pytest.mark.parametrize(
    "extra", [[], ["--ema", "0.99"], ["--precision", "bf16"], ["--decay", "1"]], ids=["plain", "ema", "bf16", "decay"]
)
@pytest.mark.parametrize("stop", [3, 5, 12])
def test_stopped_and_resumed_equals_uninterrupted(tmp_path, tiny, stop, extra):
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    assert run(DCGANConfig, [*tiny, *extra, "--output", whole, "--log-every", "1"]) == 0
    assert run(DCGANConfig, [*tiny, *extra, "--output", parts, "--log-every", "1", "--max-steps", str(stop)]) == 0
    # The settings come from the checkpoint; the limit it reached is lifted.
    assert run(DCGANConfig, ["--resume", parts]) == 0
    assert_bit_identical(checkpoint(whole), checkpoint(parts))
    without_speed = [[{**record, "images_per_second": 0} for record in metrics(folder)] for folder in (whole, parts)]
    assert without_speed[0] == without_speed[1]
    assert (Path(whole) / "samples" / "epoch_0004.png").read_bytes() == (
        Path(parts) / "samples" / "epoch_0004.png"
    ).read_bytes()


def test_resume_into_another_folder_takes_the_history_along(tmp_path, tiny):
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    run(DCGANConfig, [*tiny, "--output", a, "--max-steps", "6"])
    before = (tmp_path / "a" / "checkpoint.pt").read_bytes()
    assert run(DCGANConfig, [*tiny, "--resume", a, "--output", b]) == 0
    assert (tmp_path / "a" / "checkpoint.pt").read_bytes() == before
    assert metrics(b)[0] == metrics(a)[0] and metrics(b)[-1]["step"] == 20
    assert len(list((tmp_path / "b" / "samples").iterdir())) == 4


def test_metrics_after_the_checkpoint_and_half_a_line_are_dropped_on_resume(tmp_path, tiny):
    run(DCGANConfig, [*tiny, "--output", str(tmp_path), "--log-every", "1", "--max-steps", "6"])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(json.dumps(metrics(tmp_path)[-1] | {"step": 7}) + '\n{"step": 8, "epo')
    assert run(DCGANConfig, ["--resume", str(tmp_path), "--max-steps", "8"]) == 0
    assert [record["step"] for record in metrics(tmp_path)] == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("end", [b"\0\0\0", b"\xff\xfe", b"7\n", b'{"epoch": 1}\n', b'{"step": null}\n'])
def test_what_is_no_line_of_figures_ends_the_file(tmp_path, end):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + end + b'\n{"step": 2}\n')
    assert Metrics(path, 5).read() == [{"step": 1}] and path.read_text() == '{"step": 1}\n'


def wait_for(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"the run ended early: {process.communicate()}"
        assert time.monotonic() < end, "the run made no progress"
        time.sleep(0.002)


def own_signals():
    """In a process to be started: SIGHUP as it is without nohup, and an end should the test forget it."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.alarm(300)


def start(arguments):
    # A session of its own, so that a signal meant for it alone reaches it alone.
    return subprocess.Popen([sys.executable, str(EXAMPLE), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, start_new_session=True, preexec_fn=own_signals)


def lines(path):
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_killed_twice_and_resumed_equals_uninterrupted(tmp_path, tiny):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    # So frequent checkpoints that a kill often hits the writing of one.
    run_forever = [*tiny, "--epochs", "100000", "--checkpoint-every", "2", "--log-every", "1"]
    for arguments, more in (([], 20), (["--resume", str(killed)], 25)):
        already = lines(killed / "metrics.jsonl")
        process = start([*run_forever, *arguments, "--output", str(killed)])
        wait_for(lambda: lines(killed / "metrics.jsonl") > already + more, process)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    steps = checkpoint(killed)["step"]
    assert steps >= 40
    last = ["--max-steps", str(steps + 3)]
    assert run(DCGANConfig, ["--resume", str(killed), *last]) == 0
    assert run(DCGANConfig, [*run_forever, *last, "--output", str(whole)]) == 0
    assert_bit_identical(checkpoint(killed), checkpoint(whole))
    assert [record["step"] for record in metrics(killed)] == list(range(1, steps + 4))


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_interrupt_saves_and_says_how_to_resume(tmp_path, tiny, number, status):
    out = tmp_path / "run"
    process = start([*tiny, "--epochs", "100000", "--log-every", "1", "--output", str(out)])
    wait_for(lambda: lines(out / "metrics.jsonl") > 3, process)
    os.kill(process.pid, number)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert f"--resume {out}" in printed and "Traceback" not in errors
    # Saved at the very step it stopped at, not at the last checkpoint.
    assert checkpoint(out)["step"] == metrics(out)[-1]["step"]
    assert (out / "samples.gif").exists()


@pytest.mark.parametrize("streams", ["| true", ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_run_goes_on_where_nobody_reads_what_it_prints(tmp_path, tiny, streams):
    flags = [*tiny, "--log-every", "1", "--output", str(tmp_path / "run")]
    command = f"nohup {shlex.join([sys.executable, str(EXAMPLE), *flags])} {streams}"
    run = subprocess.run(["bash", "-o", "pipefail", "-c", command], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert run.returncode == 0 and "Error" not in run.stdout + run.stderr, run.stderr
    assert checkpoint(tmp_path / "run")["step"] == 20 and (tmp_path / "run" / "samples.gif").exists()


def test_a_terminal_that_was_closed_ends_a_run_after_its_step(tmp_path, tiny):
    master, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, str(EXAMPLE), *tiny, "--epochs", "100000", "--log-every", "1", "--output", str(tmp_path / "run")],
        stdin=terminal, stdout=terminal, stderr=terminal,
        preexec_fn=lambda: (own_signals(), os.setsid(), fcntl.ioctl(0, termios.TIOCSCTTY, 0)),
    )  # fmt: skip
    os.close(terminal)
    os.set_blocking(master, False)
    end = time.monotonic() + 60
    while lines(tmp_path / "run" / "metrics.jsonl") < 4:
        with contextlib.suppress(BlockingIOError):
            os.read(master, 65536)
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    os.close(master)  # which sends SIGHUP, and fails every write from now on
    assert process.wait(60) == 129
    assert checkpoint(tmp_path / "run")["step"] == metrics(tmp_path / "run")[-1]["step"]


def test_a_handler_of_ones_own_for_sighup_is_called():
    calls, before = [], signal.signal(signal.SIGHUP, lambda number, frame: calls.append(number))
    try:
        with deferred_signals() as received:
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert calls == [signal.SIGHUP] and received == []


def test_a_name_that_standard_output_cannot_encode_is_no_error(tmp_path, tiny):
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    run = subprocess.run([sys.executable, str(EXAMPLE), *tiny, "--max-steps", "2", "--output", str(tmp_path / "ausgäbe")],
                         capture_output=True, text=True, env=environment)
    assert run.returncode == 0 and "ausg\\xe4be" in run.stdout, run.stderr


def test_a_figure_with_one_point_is_seen(tmp_path):
    save_curves(tmp_path / "without.png", [{"step": 1}])
    save_curves(tmp_path / "one.png", [{"step": 5, "error": 1.0}])
    blue = (np.asarray(Image.open(tmp_path / "one.png").convert("RGB")) == (31, 119, 180)).all(-1).sum()
    assert blue > 9


@pytest.mark.parametrize("method", ["train_step", "_draw"])
def test_an_interrupt_in_or_after_the_last_step_leaves_a_finished_run(tmp_path, images, capsys, method):
    trainer = trainer_in(tmp_path, images, max_steps=3)
    original = getattr(trainer, method)

    def interrupted(*arguments):
        if trainer.step >= 2:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*arguments)

    setattr(trainer, method, interrupted)
    trainer.train()
    assert checkpoint(tmp_path)["step"] == 3 and "to go on" not in capsys.readouterr().out


def test_an_interrupt_before_the_first_step_is_not_lost(tmp_path, images, monkeypatch):
    trainer = trainer_in(tmp_path, images)
    monkeypatch.setattr("fastgan.train.trainer.keep_freed_memory", lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert checkpoint(tmp_path)["step"] == 1


def test_resume_refuses_another_configuration_by_name(tmp_path, tiny, capsys):
    run(DCGANConfig, [*tiny, "--output", str(tmp_path), "--max-steps", "1"])
    before = (tmp_path / "checkpoint.pt").read_bytes()
    assert run(DCGANConfig, ["--resume", str(tmp_path), "--base-channels", "4", "--learning-rate", "1"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: the checkpoint is of another configuration: ") and error.count("\n") == 1
    assert "--base-channels is 2 in the checkpoint, 4 was asked for" in error and "--learning-rate" in error
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_resume_refuses_other_images(tmp_path, tiny, capsys):
    run(DCGANConfig, [*tiny, "--output", str(tmp_path / "run"), "--max-steps", "1"])
    others = tmp_path / "others"
    others.mkdir()
    for i in range(40):
        Image.new("L", (8, 8), i).save(others / f"{i}.png")
    assert run(DCGANConfig, ["--resume", str(tmp_path / "run"), "--data-root", str(others)]) == 1
    assert "trained on other images" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no checkpoint to resume from"),
        (b"", "damaged, or not a checkpoint"),
        (b"PK\x03\x04 truncated", "damaged, or not a checkpoint"),
        ({"weights": torch.zeros(3)}, "not a checkpoint of a fastgan run"),
        ({"family": "catgan"}, "of family 'catgan', expected 'dcgan'"),
        ({"family": "dcgan", "step": 1}, "not a checkpoint of a fastgan run, which holds more than family, step"),
    ],
)
def test_resume_from_an_unfit_file_is_one_line(tmp_path, content, message, capsys):
    if isinstance(content, dict):
        torch.save(content, tmp_path / "checkpoint.pt")
    elif content is not None:
        (tmp_path / "checkpoint.pt").write_bytes(content)
    assert run(DCGANConfig, ["--resume", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_resume_from_a_checkpoint_with_a_changed_byte_is_refused(tmp_path, tiny, capsys):
    run(DCGANConfig, [*tiny, "--output", str(tmp_path), "--max-steps", "1"])
    content = bytearray((tmp_path / "checkpoint.pt").read_bytes())
    weight = checkpoint(tmp_path)["networks"]["generator"]["main.0.weight"].numpy().tobytes()
    content[content.index(weight)] ^= 1
    (tmp_path / "checkpoint.pt").write_bytes(content)
    assert run(DCGANConfig, ["--resume", str(tmp_path)]) == 1
    assert "checkpoint.pt: damaged, or not a checkpoint (wrong checksum of" in capsys.readouterr().err


# --- what goes wrong while running


def test_truncated_checkpoint_write_leaves_the_previous_one(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    write_atomically(path, b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TrainingError, match="No space left on device .the previous one is kept."):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_file_system_that_does_not_sync_folders_is_written_to(tmp_path, monkeypatch):
    def files_only(descriptor, fsync=os.fsync):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(22, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", files_only)
    write_atomically(tmp_path / "checkpoint.pt", b"new")
    assert (tmp_path / "checkpoint.pt").read_bytes() == b"new"


def test_two_writers_of_a_file_do_not_meet_in_a_temporary_one(tmp_path, monkeypatch):
    path, fsync = tmp_path / "cache.pt", os.fsync

    def write_in_between(descriptor):
        monkeypatch.setattr(os, "fsync", fsync)
        write_atomically(path, b"another process's")

    monkeypatch.setattr(os, "fsync", write_in_between)
    before = os.umask(0o027)
    try:
        write_atomically(path, b"own")
    finally:
        os.umask(before)
    assert path.read_bytes() == b"own" and list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("error", [OSError(30, "Read-only file system"), KeyboardInterrupt()], ids=["disk", "interrupt"])
def test_a_write_that_fails_leaves_no_temporary_file(tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(TrainingError if isinstance(error, OSError) else KeyboardInterrupt):
        write_atomically(tmp_path / "file", b"new")
    assert not list(tmp_path.iterdir())


def test_a_temporary_file_that_cannot_be_removed_does_not_hide_why_nothing_was_written(tmp_path, monkeypatch):
    def read_only(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "replace", read_only)
    monkeypatch.setattr(Path, "unlink", read_only)
    with pytest.raises(TrainingError, match="file cannot be written: Read-only file system"):
        write_atomically(tmp_path / "file", b"new")


def test_curves_that_cannot_be_drawn_cost_no_step(tmp_path, images):
    trainer = trainer_in(tmp_path, images, max_steps=7)
    (tmp_path / "losses.png").mkdir()
    with pytest.raises(TrainingError, match="losses.png"):
        trainer.train()
    assert checkpoint(tmp_path)["step"] == 7


def test_disk_that_fills_up_during_training_keeps_the_last_checkpoint(tmp_path, images):
    trainer = trainer_in(tmp_path, images, epochs=2)
    before = checkpoint(tmp_path)
    size = (tmp_path / "checkpoint.pt").stat().st_size
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Grids and metrics still fit, the next checkpoint does not.
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, limits[1]))
    try:
        with pytest.raises(TrainingError, match="checkpoint.pt cannot be written: .*previous one is kept"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert_bit_identical(checkpoint(tmp_path), before)


def test_output_that_is_a_file_is_refused_before_training(tmp_path, tiny, capsys):
    (tmp_path / "file").write_text("")
    assert run(DCGANConfig, [*tiny, "--output", str(tmp_path / "file")]) == 1
    assert f"--output {tmp_path / 'file'}: cannot be written to" in capsys.readouterr().err


def test_a_file_in_place_of_the_samples_is_one_line_on_resume(tmp_path, tiny, capsys):
    assert run(DCGANConfig, [*tiny, "--output", str(tmp_path), "--max-steps", "1"]) == 0
    (tmp_path / "samples" / "epoch_0001.png").unlink()
    (tmp_path / "samples").rmdir()
    (tmp_path / "samples").write_text("")
    assert run(DCGANConfig, ["--resume", str(tmp_path)]) == 1
    assert f"error: {tmp_path / 'samples'} cannot be written: File exists\n" == capsys.readouterr().err


def test_read_only_output_is_refused_before_training(tmp_path, tiny, capsys):
    # The kernel's own read-only folder: a mode without write permission does not stop root.
    out = "/proc/self/fdinfo" if os.geteuid() == 0 else str(tmp_path)
    os.chmod(tmp_path, 0o500)
    try:
        assert run(DCGANConfig, [*tiny, "--output", out]) == 1
    finally:
        os.chmod(tmp_path, 0o700)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "cannot be written" in error and error.count("\n") == 1


@pytest.mark.parametrize("network, layer", [("generator", 3), ("discriminator", 2)])
def test_nan_weight_stops_the_run_with_step_network_and_layer(tmp_path, images, network, layer):
    trainer = trainer_in(tmp_path, images, epochs=4)
    step = trainer.train_step

    def poisoned_in_the_seventh_step(batch):
        if trainer.step == 6:
            with torch.no_grad():
                trainer.networks[network].main[layer].weight[0] = float("nan")
        return step(batch)

    trainer.train_step = poisoned_in_the_seventh_step
    with pytest.raises(TrainingError, match=rf"step 7: the loss of the discriminator is nan; .*: {network}.* layer main\.{layer} "):
        trainer.train()
    # The checkpoint of the end of epoch 1 is whole and finite.
    saved = checkpoint(tmp_path)
    assert saved["step"] == 5
    assert all(tensor.isfinite().all() for tensor in tensors(saved["networks"]).values())


def test_nan_that_arises_in_a_layer_without_weights_is_located():
    class Logarithm(nn.Module):
        def forward(self, x):
            return x.log()

    discriminator = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), Logarithm()), nn.Linear(4, 1))
    found = locate_nonfinite(nn.Linear(3, 4), discriminator, torch.randn(8, 4), torch.randn(8, 3))
    assert found == "discriminator on real images, layer 1.1 (output of Logarithm)"
    assert locate_nonfinite(nn.Linear(3, 4), nn.Linear(4, 1), torch.full((8, 4), torch.inf), torch.randn(8, 3)) == (
        "the training images"
    )


def test_learning_rate_that_explodes_is_reported_in_one_line(tmp_path, tiny, capsys):
    arguments = [*tiny, "--learning-rate", "1e38", "--generator-loss", "wasserstein", "--output", str(tmp_path)]
    assert run(DCGANConfig, arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: step ") and "layer" in error and error.count("\n") == 1


def test_weights_that_are_not_finite_are_not_saved(tmp_path, tiny, capsys):
    # The loss of the step is finite: only the next one would show them.
    rates = ["--learning-rate", "1e39", "--discriminator-learning-rate", "1e-4"]
    assert run(DCGANConfig, [*tiny, *rates, "--max-steps", "1", "--output", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: step 1: not finite: generator, layer main.0 (weight of ConvTranspose") and error.count("\n") == 1
    saved = checkpoint(tmp_path)
    assert saved["step"] == 0 and all(tensor.isfinite().all() for tensor in tensors(saved["networks"]).values())


def test_running_statistics_that_are_not_finite_are_not_saved_and_a_mask_is(tmp_path, images):
    trainer = trainer_in(tmp_path, images, fuse=False)
    trainer.networks["discriminator"].register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    trainer.save()
    trainer.networks["generator"].main[1].running_var[0] = torch.inf
    with pytest.raises(TrainingError, match=r"not finite: generator, layer main\.1 \(running_var of BatchNorm2d\)"):
        trainer.save()
    assert checkpoint(tmp_path)["networks"]["generator"]["main.1.running_var"].isfinite().all()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--batch-size", "41"], "batch_size must be between 1 and the number of images, 40"),
        (["--batch-size", "25", "--discriminator-steps", "2"], "got 2 parts of 25"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--beta1", "1"], "--beta1 must be below 1, got 1.0"),
        (["--image-size", "30"], "image_size must be 4 * 2**n"),
        (["--data-root", "/no/such/place"], "no such folder: /no/such/place"),
        (["--precision", "fp16"], "--precision fp16 needs a GPU"),
        (["--output", ""], "--output must be a folder, got an empty path"),
        (["--keep-checkpoints", "1,x"], "--keep-checkpoints must be 'all' or epochs with commas between"),
    ],
)
def test_wrong_settings_are_one_line_and_no_output(tmp_path, tiny, arguments, message, capsys):
    out = tmp_path / "out"
    assert run(DCGANConfig, [*tiny, "--output", str(out), *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not out.exists()


def test_unknown_flag_and_choice_exit_with_2(capsys):
    for arguments in (["--batchsize", "3", "--no-such-flag"], ["--dataset", "cifar"]):
        with pytest.raises(SystemExit) as error:
            run(DCGANConfig, arguments)
        assert error.value.code == 2


# --- one step


def test_parser_knows_every_setting_and_returns_only_what_was_given():
    assert parse_arguments(DCGANConfig, []) == {}
    given = parse_arguments(DCGANConfig, ["--image-size", "64", "--no-fuse", "--beta1", "0.9", "--resume", "x"])
    assert given == {"image_size": 64, "fuse": False, "beta1": 0.9, "resume": "x"}
    for field in dataclasses.fields(DCGANConfig):
        assert field.metadata["help"]


def state_of(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def test_each_network_is_bit_identical_while_the_other_learns(tmp_path, images):
    trainer = trainer_in(tmp_path, images)
    generator, discriminator = trainer.networks.values()
    seen = {}

    class Watching(Objective):
        def discriminator_losses(self, network, batch, fake):
            assert not fake.requires_grad
            seen["generator"], seen["discriminator"] = state_of(generator), state_of(discriminator)
            return super().discriminator_losses(network, batch, fake)

        def generator_loss(self, network, batch, fake):
            assert all(torch.equal(tensor, seen["generator"][name]) for name, tensor in generator.state_dict().items())
            changed = [name for name, parameter in discriminator.named_parameters()
                       if not torch.equal(parameter, seen["discriminator"][name])]
            assert len(changed) == len(list(discriminator.parameters()))
            seen["discriminator"] = state_of(discriminator)
            assert not any(parameter.requires_grad for parameter in discriminator.parameters())
            return super().generator_loss(network, batch, fake)

    trainer.objective = Watching()
    trainer.train_step(next(trainer.batches.epoch(0)))
    for name, tensor in discriminator.state_dict().items():
        assert torch.equal(tensor, seen["discriminator"][name]), name
    # No weight gradient was computed for the discriminator in the generator's step.
    assert all(parameter.grad is None for parameter in discriminator.parameters())
    assert any(not torch.equal(p, seen["generator"][name]) for name, p in generator.named_parameters())


def test_freezing_leaves_a_parameter_that_was_frozen_before_frozen():
    network = nn.Linear(2, 2)
    network.weight.requires_grad_(False)
    with Frozen(network):
        assert not network.bias.requires_grad
    assert network.bias.requires_grad and not network.weight.requires_grad


def test_a_layer_frozen_after_the_trainer_was_made_stays_as_it_is(tmp_path, images):
    trainer = trainer_in(tmp_path, images)
    for network in trainer.networks.values():
        next(network.parameters()).requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in tensors({n: m.state_dict() for n, m in trainer.networks.items()}).items()}
    for batch in [*trainer.batches.epoch(0)]:
        trainer.train_step(batch)
    after = tensors({n: m.state_dict() for n, m in trainer.networks.items()})
    for name, network in trainer.networks.items():
        (first, frozen), *others = network.named_parameters()
        assert not frozen.requires_grad and torch.equal(after[f"/{name}/{first}"], before[f"/{name}/{first}"])
        assert all(parameter.requires_grad for _, parameter in others)
        assert any(not torch.equal(after[f"/{name}/{other}"], before[f"/{name}/{other}"]) for other, _ in others)


def test_training_follows_the_plain_loop_of_the_paper(tmp_path, images):
    """Twelve steps of the trainer against the algorithm written out with PyTorch alone."""
    trainer = trainer_in(tmp_path, images, seed=5, fuse=False, learning_rate=2e-4)
    torch.manual_seed(5)
    generator, discriminator, _ = trainer.config.build(load_dataset("folder", images, image_size=8, channels=1))
    adam = [torch.optim.Adam(n.parameters(), lr=2e-4, betas=(0.5, 0.999)) for n in (discriminator, generator)]
    criterion = nn.BCEWithLogitsLoss()
    epochs = [batch for epoch in range(3) for batch in trainer.batches.epoch(epoch)][:12]
    state = torch.get_rng_state()
    expected = []
    for batch in epochs:
        fake = generator(torch.randn(8, 5))
        loss_d = criterion(discriminator(batch.images), torch.ones(8)) + criterion(
            discriminator(fake.detach()), torch.zeros(8)
        )
        adam[0].zero_grad()
        loss_d.backward()
        adam[0].step()
        loss_g = criterion(discriminator(fake), torch.ones(8))
        adam[1].zero_grad()
        loss_g.backward()
        adam[1].step()
        expected.append((loss_d.item(), loss_g.item()))
    torch.set_rng_state(state)
    figures = [trainer.train_step(batch) for batch in epochs]
    found = [(figure["loss_d"].item(), figure["loss_g"].item()) for figure in figures]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config_class", [DCGANConfig, CatGANConfig, GANConfig])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (1, 32, 16)])
def test_images_of_another_shape_than_the_settings_are_refused_before_the_run(tmp_path, config_class, shape):
    dataset = ImageDataset("mine", torch.zeros(400, *shape, dtype=torch.uint8), torch.arange(400) % 10)
    config = config_class(image_size=32, channels=1, batch_size=20, device="cpu", output=str(tmp_path / "run"))
    message = rf"dataset must have images of shape \[1, 32, 32\], as image_size and channels say, got {re.escape(str(list(shape)))}"
    with pytest.raises(ValueError, match=message):
        Trainer(config, dataset)
    assert not (tmp_path / "run").exists()


def test_decay_lowers_the_step_size_over_the_last_part_of_the_run(tmp_path, images):
    trainer = trainer_in(tmp_path, images, epochs=1, decay=0.5, learning_rate=1e-3)
    rates = []
    for batch in trainer.batches.epoch(0):
        trainer.train_step(batch)
        trainer.step += 1
        rates.append(float(trainer.optimizers["generator"].param_groups[0]["lr"]))
    assert rates == pytest.approx([1e-3, 1e-3, 1e-3, 8e-4, 4e-4])
    with pytest.raises(ValueError, match="--decay must be at most 1, got 2"):
        DCGANConfig(decay=2)


def test_averaged_weights_lie_between_the_old_and_the_new_and_make_the_samples(tmp_path, images):
    trainer = trainer_in(tmp_path, images, ema=0.9, learning_rate=0.1)
    for batch in trainer.batches.epoch(0):
        trainer.train_step(batch)
    averaged = trainer.averaged["generator"].module
    current = trainer.networks["generator"]
    assert not torch.equal(averaged.main[0].weight, current.main[0].weight)
    expected = averaged.eval()(trainer.grid_noise)
    torch.testing.assert_close(trainer.samples(trainer.grid_noise), expected, rtol=0, atol=0)


def test_sampling_changes_nothing(tmp_path, images):
    trainer = trainer_in(tmp_path, images)
    before, random = state_of(trainer.networks["generator"]), torch.get_rng_state()
    trainer.samples(trainer.grid_noise)
    assert trainer.networks["generator"].training
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.networks["generator"].state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_figures_of_an_objective_reach_metrics_and_curves(tmp_path, images):
    class WithTestError(Objective):
        def evaluate(self, trainer):
            return {"test_error": 1 / trainer.step}

    trainer = trainer_in(tmp_path, images, epochs=2, log_every=3)
    trainer.objective = WithTestError()
    trainer.train()
    assert [(r["step"], r.get("test_error")) for r in metrics(tmp_path)] == [
        (3, None), (5, 0.2), (6, None), (9, None), (10, 0.1)
    ]


def test_trainer_runs_in_a_thread_other_than_the_main_one(tmp_path, images):
    trainer = trainer_in(tmp_path, images, epochs=1)
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join(60)
    assert trainer.step == 5 and checkpoint(tmp_path)["step"] == 5


def test_wrong_networks_for_a_checkpoint_are_refused(tmp_path, images):
    trainer = trainer_in(tmp_path / "a", images)
    config = dataclasses.replace(trainer.config, base_channels=4, output=str(tmp_path / "b"))
    with pytest.raises(TrainingError, match="does not fit these networks"):
        Trainer(config, load_dataset("folder", images, image_size=8, channels=1), checkpoint(tmp_path / "a"))
