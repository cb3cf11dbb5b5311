"""Alarms of the trainer, and TensorBoard."""

import json
import math
import sys

import pytest
import torch
from torch import nn

from fastgan.data import ImageDataset
from fastgan.train import DCGANConfig, GANConfig, Trainer, run
from fastgan.train.alarms import COLLAPSE_FROM_STEP, WINDOW_STEPS, Alarms, diversity, gradient_size
from fastgan.train.checkpoint import load_checkpoint

# Bright images, which are soon told from what an untrained generator makes.
IMAGES = torch.randint(200, 256, (40, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
SETTINGS = {"image_size": 8, "channels": 1, "batch_size": 8, "base_channels": 8, "latent_dim": 5, "device": "cpu",
            "ema": 0, "log_every": 10, "epochs": 1000}  # fmt: skip
DATASET = ImageDataset("digits", IMAGES, None)


def trained(folder, steps, prepare=lambda trainer: None, checkpoint=None, **settings):
    config = DCGANConfig(**SETTINGS | settings, max_steps=steps, output=str(folder), resume=checkpoint and str(folder))
    trainer = Trainer(config, DATASET, checkpoint)
    prepare(trainer)
    trainer.train()
    return trainer


def alarms(folder):
    return [json.loads(line) for line in (folder / "alarms.jsonl").read_text().splitlines()]


def of(folder, name):
    return [alarm for alarm in alarms(folder) if alarm["alarm"] == name]


def generator_stands_still(trainer):
    """The discriminator learns at its rate, the generator not at all."""
    trainer.optimizers["generator"].step = lambda: None


# --- each alarm, from a run in which it is true


def test_a_discriminator_that_has_won_is_reported_once_with_advice(tmp_path, capsys):
    trained(tmp_path, 400, generator_stands_still, learning_rate=0.01)
    (alarm,) = of(tmp_path, "discriminator has won")
    assert alarm["d_real"] > 0.99 and alarm["d_fake"] < 0.01 and WINDOW_STEPS <= alarm["step"] < 400
    lines = [line for line in capsys.readouterr().out.splitlines() if "discriminator has won" in line]
    assert len(lines) == 1 and lines[0].startswith(f"alarm at step {alarm['step']}: ") and "lower --learning-rate" in lines[0]


def test_a_generator_that_ignores_its_input_is_mode_collapse(tmp_path):
    def ignore_z(trainer):
        weight = trainer.networks["generator"].main[0].weight
        nn.init.zeros_(weight)
        weight.requires_grad_(False)

    trained(tmp_path, 520, ignore_z)
    (alarm,) = of(tmp_path, "mode collapse")
    # Whenever a grid was drawn, that is every fifth step, it was true; said the first time it counted.
    assert alarm["diversity"] < 1e-3 and alarm["step"] == COLLAPSE_FROM_STEP


def test_the_minimax_loss_against_a_sure_discriminator_is_a_vanishing_gradient(tmp_path):
    trained(tmp_path, 500, generator_stands_still, learning_rate=0.05, generator_loss="minimax")
    (alarm,) = of(tmp_path, "vanishing generator gradient")
    assert alarm["gradient"] < 1e-3 * alarm["gradient_at_start"]


def test_a_run_in_which_both_learn_raises_none_of_them(tmp_path):
    # Images that have something to learn: a bright square in one of nine places.
    images = torch.zeros(72, 1, 8, 8, dtype=torch.uint8)
    for number in range(72):
        row, column = divmod(number % 9, 3)
        images[number, :, 2 * row : 2 * row + 4, 2 * column : 2 * column + 4] = 255
    settings = SETTINGS | {"learning_rate": 1e-3, "ema": 0.99}
    config = DCGANConfig(**settings, max_steps=700, output=str(tmp_path))
    Trainer(config, ImageDataset("digits", images, None)).train()
    assert alarms(tmp_path) == []


# --- when an alarm is raised


def quiet_generator():
    network = nn.Linear(2, 2)
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    return network


def steps_of_alarms(watch, figures):
    network = quiet_generator()
    return [alarm["step"] for step, (real, fake) in figures for alarm in watch.logged(step, {"d_real": real, "d_fake": fake}, network)]


def test_an_alarm_is_raised_once_an_episode():
    won, lost = (0.999, 0.001), (0.6, 0.4)
    figures = [(step, won if step <= 500 or step > 1000 else lost) for step in range(10, 2001, 10)]
    found = steps_of_alarms(Alarms("non_saturating"), figures)
    assert len(found) == 2 and WINDOW_STEPS <= found[0] <= WINDOW_STEPS + 10 and 1000 < found[1] <= 1000 + WINDOW_STEPS


@pytest.mark.parametrize("real, fake", [(0.999, 0.02), (0.98, 0.001)])
def test_a_discriminator_that_errs_has_not_won(real, fake):
    assert steps_of_alarms(Alarms("non_saturating"), [(step, (real, fake)) for step in range(10, 1001, 10)]) == []


def test_single_steps_out_of_the_ordinary_neither_raise_nor_end_an_alarm():
    figures = [(step, (0.999, 0.001) if step % 30 == 0 else (0.7, 0.3)) for step in range(10, 1001, 10)]
    assert steps_of_alarms(Alarms("non_saturating"), figures) == []
    figures = [(step, (0.7, 0.3) if step % 30 == 0 else (0.999, 0.001)) for step in range(10, 1001, 10)]
    assert len(steps_of_alarms(Alarms("non_saturating"), figures)) == 1


def test_rare_log_lines_are_judged_by_several_all_the_same():
    figures = [(step, (0.999, 0.001)) for step in range(1000, 9001, 1000)]
    assert steps_of_alarms(Alarms("non_saturating"), figures) == [5000]


def test_outputs_that_are_no_probabilities_are_not_judged_as_such():
    figures = [(step, (0.999, 0.001)) for step in range(10, 1001, 10)]
    assert steps_of_alarms(Alarms("hinge"), figures) == []


def test_networks_side_by_side_are_judged_each_by_itself():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(40, 1, 4, 4, generator=generator)
    samples = images.clone()
    samples[20:30] = samples[20]
    watch = Alarms("non_saturating", parts=4)
    (alarm,) = watch.drawn(1000, samples, images)
    assert "network 2 of 4" in alarm["message"] and alarm["diversity"] == 0
    assert watch.drawn(1001, samples, images) == []
    assert watch.drawn(1002, images, images) == [] != watch.drawn(1003, samples, images)


def test_diversity_is_the_root_mean_squared_distance_of_pairs():
    images = torch.randn(12, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = [torch.pdist(part.flatten(1)).square().mean().sqrt() for part in images.split(6)]
    torch.testing.assert_close(diversity(images, 2), torch.stack(expected))


def test_gradient_size_is_a_root_mean_square_and_knows_the_scale_of_float16():
    network = quiet_generator()
    network.weight.grad.mul_(2)
    assert gradient_size(network) == pytest.approx(math.sqrt((4 * 4 + 2) / 6))
    watch = Alarms("hinge")
    for step in range(10, 2 * WINDOW_STEPS, 10):
        network.weight.grad.fill_(65536.0)
        network.bias.grad.fill_(math.inf if step == 20 else 65536.0)
        assert watch.logged(step, {}, network, gradient_scale=65536.0) == []
    assert watch.state_dict()["first_gradient"] == pytest.approx(1)


def test_a_resumed_run_neither_repeats_nor_forgets_an_alarm(tmp_path, capsys):
    trained(tmp_path / "whole", 400, generator_stands_still, learning_rate=0.01)
    at = of(tmp_path / "whole", "discriminator has won")[0]["step"]
    for first in (at - 50, at + 20):
        folder = tmp_path / str(first)
        trained(folder, first, generator_stands_still, learning_rate=0.01)
        checkpoint = load_checkpoint(folder / "checkpoint.pt")
        trained(folder, 400, generator_stands_still, checkpoint, learning_rate=0.01)
        assert of(folder, "discriminator has won") == of(tmp_path / "whole", "discriminator has won")


def test_the_figures_of_the_step_a_run_is_stopped_at_do_not_count(tmp_path):
    trained(tmp_path / "whole", 30, log_every=4)
    trained(tmp_path / "stopped", 13, log_every=4)
    checkpoint = load_checkpoint(tmp_path / "stopped" / "checkpoint.pt")
    trained(tmp_path / "stopped", 30, log_every=4, checkpoint=checkpoint)
    states = [load_checkpoint(tmp_path / name / "checkpoint.pt")["alarms"] for name in ("whole", "stopped")]
    assert states[0] == states[1] and len(states[0]["windows"]["gradient"]) == 12


def test_samples_are_looked_at_after_every_epoch_and_where_a_run_stops(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(Alarms, "drawn", lambda alarms, step, samples, images: seen.append(step) or [])
    trained(tmp_path, 13)
    assert seen == [5, 10, 13]


def test_checkpoints_from_before_there_were_alarms_are_resumed(tmp_path):
    trained(tmp_path, 5)
    checkpoint = load_checkpoint(tmp_path / "checkpoint.pt")
    del checkpoint["alarms"]
    assert trained(tmp_path, 7, checkpoint=checkpoint).step == 7


# --- TensorBoard


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    return accumulator


def test_tensorboard_has_the_figures_and_the_grids(tmp_path):
    trained(tmp_path, 12, tensorboard=True, log_every=4)
    found = events(tmp_path)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {"loss_d", "loss_g", "d_real", "d_fake", "images_per_second"} <= set(found.Tags()["scalars"])
    for name in ("loss_d", "d_fake"):
        points = [(event.step, event.value) for event in found.Scalars(name)]
        assert points == [(record["step"], pytest.approx(record[name])) for record in records]
    assert [event.step for event in found.Images("samples")] == [5, 10, 12]
    assert (found.Images("samples")[0].width, found.Images("samples")[0].height) == (656, 656)


def test_a_resumed_run_has_no_point_twice(tmp_path):
    # As after a kill: lines and points of steps 6 to 9 were written, the last checkpoint is of step 5.
    trained(tmp_path, 5, tensorboard=True, log_every=1)
    checkpoint = load_checkpoint(tmp_path / "checkpoint.pt")
    trained(tmp_path, 9, checkpoint=checkpoint, tensorboard=True, log_every=1)
    trained(tmp_path, 12, checkpoint=checkpoint, tensorboard=True, log_every=1)
    found = events(tmp_path)
    assert [event.step for event in found.Scalars("loss_g")] == list(range(1, 13))
    assert [event.step for event in found.Images("samples")] == [5, 10, 12]


def test_missing_tensorboard_is_one_line_that_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    out = tmp_path / "run"
    arguments = ["--image-size", "8", "--device", "cpu", "--max-steps", "1", "--output", str(out)]
    assert run(DCGANConfig, [*arguments, "--tensorboard"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--tensorboard needs tensorboard" in error
    assert "pip install 'fastgan[tensorboard]'" in error and not out.exists()


def test_ten_networks_side_by_side_are_watched_too(tmp_path):
    labels = torch.arange(40) % 10
    config = GANConfig(image_size=8, batch_size=2, device="cpu", max_steps=COLLAPSE_FROM_STEP, epochs=1000,
                       learning_rate=0, ema=0, output=str(tmp_path), latent_dim=3)  # fmt: skip
    trainer = Trainer(config, ImageDataset("digits", IMAGES, labels))
    with torch.no_grad():
        trainer.networks["generator"].main[0].weight[4] = 0
    trainer.train()
    (alarm,) = of(tmp_path, "mode collapse")
    assert "(network 4 of 10)" in alarm["message"]
