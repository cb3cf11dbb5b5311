"""Mean and standard deviation over the seeds of an experiment."""

import json
import re

import pytest

from fastgan.metrics.seeds import main


def run(folder, seed, error, epochs=2, **settings):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"seed": seed, "output": str(folder), "epochs": epochs} | settings))
    records = [{"step": 1, "epoch": 1, "loss_d": 1.0}, {"step": 2, "epoch": 1, "test_error": 9.0}]
    records.append({"step": 4, "epoch": 2, "test_error": error})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(folder)


def test_mean_and_deviation_of_the_last_values(tmp_path, capsys):
    runs = [run(tmp_path / str(seed), seed, error) for seed, error in ((0, 1.0), (1, 2.0), (7, 3.0))]
    assert main(runs) == 0
    assert capsys.readouterr().out == "seed 0: 1\nseed 1: 2\nseed 7: 3\ntest_error: 2 ± 1 over 3 seeds\n"


def test_a_run_is_finished_with_its_last_step_or_epoch(tmp_path, capsys):
    runs = [run(tmp_path / str(seed), seed, 1.0, epochs, max_steps=steps) for seed, epochs, steps in ((0, 3, 4), (1, 2, 9))]
    assert [main([each]) for each in runs] == [0, 0]


def test_a_run_short_of_its_last_step_and_epoch_is_refused(tmp_path, capsys):
    assert main([run(tmp_path / "run", 0, 1.0, epochs=3, max_steps=5)]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'run'} is not finished: it is at step 4 of 5\n"


@pytest.mark.parametrize(
    "second, figure, message",
    [
        ({"seed": 0}, "test_error", "seed 0 is there twice"),
        ({"seed": 1, "labels": "all"}, "test_error", "differs from .* in more than its seed: labels"),
        ({"seed": 1, "epochs": 3}, "test_error", "is not finished: test_error is of epoch 2 of 3"),
        ({"seed": 1}, "accuracy", "no figure 'accuracy' in metrics.jsonl; there are epoch, loss_d, step, test_error"),
    ],
)
def test_runs_that_do_not_belong_together_are_refused(tmp_path, capsys, second, figure, message):
    runs = [run(tmp_path / "a", 0, 1.0), run(tmp_path / "b", error=2.0, **second)]
    assert main([*runs, "--figure", figure]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_a_setting_that_one_run_alone_has_differs(tmp_path, capsys):
    runs = [run(tmp_path / "a", 0, 1.0, r1=10.0), run(tmp_path / "b", 1, 2.0)]
    for order in (runs, runs[::-1]):
        assert main(order) == 1
        assert "in more than its seed: r1" in capsys.readouterr().err


def test_a_folder_without_a_run_is_named(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    assert f"{tmp_path} does not hold a training run" in capsys.readouterr().err
