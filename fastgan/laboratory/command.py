"""The laboratory from a command line."""

import contextlib
import dataclasses
import json
import math
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fastgan._errors import memory_message, until_pipe_closes
from fastgan.laboratory import pictures
from fastgan.laboratory.experiment import (
    STEPS_PER_EPOCH, LaboratoryConfig, Run, fit_discriminator, gradient_norms, median_figures, train,
)
from fastgan.laboratory.mixture import Mixture, distances
from fastgan.train.checkpoint import TrainingError, load_checkpoint, save_checkpoint, write_atomically
from fastgan.train.config import parse_arguments, resumed_checkpoint, resumed_config
from fastgan.train.outputs import Progress, claim_folder, prepare_folder, say, write_json
from fastgan.train.trainer import deferred_signals

CRITERION = "|mean error| < 0.1, std ratio 0.7 to 1.3, KS < 0.15"


# Flags of the other examples that mean nothing here, with what does.
FOREIGN = {
    "--dataset": "the data are set by --means and --stds", "--data-root": "no files are read",
    "--image-size": "a sample is one number", "--channels": "a sample is one number",
    "--latent-dim": "the input is one number, see --noise-range",
}


def foreign_flag(arguments: list[str]) -> str | None:
    """What is wrong with a flag among ``arguments`` that only the other examples have; None without one."""
    flags = [flag for argument in arguments if (flag := argument.partition("=")[0]) in FOREIGN]
    return f"{flags[0]} means nothing for one-dimensional data: {FOREIGN[flags[0]]}" if flags else None


def run(arguments: list[str] | None = None) -> int:
    """Train as the command line of a script says.

    Args:
        arguments: the command line without the program's name; None takes the process's.

    Returns:
        As :func:`experiment`. Wrong flags exit with 2.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if (message := foreign_flag(arguments)) is not None:
        print(f"error: {message}", file=sys.stderr)
        return 2
    given = parse_arguments(LaboratoryConfig, arguments)
    return until_pipe_closes(lambda: experiment(given, [sys.argv[0]]))


def experiment(given: dict[str, Any], program: list[str]) -> int:
    """Train, and write figures and figures' numbers into the output folder.

    Args:
        given: the settings that are not to be the default ones, or the resumed run's.
        program: what Python is to run with --resume to go on with the run: a script, or ``-m`` and a module.

    Returns:
        Exit status: 0, 1 for an error (one line on standard error), or 130 after an interrupt, 143 after SIGTERM and 129
        after SIGHUP, which end the training after the current step, with a checkpoint and pictures of what there is so far.
    """
    try:
        if path := resumed_checkpoint(given):
            resumed = load_checkpoint(path, LaboratoryConfig.family)
            config = _resumed_config(given, resumed)
            if (step := resumed["step"]) > config.total_steps:
                print(f"step {step}, past the {config.total_steps} asked for: nothing to train")
                return 0
        else:
            resumed, config = None, LaboratoryConfig(**given)
        with deferred_signals() as signals:
            step = _experiment(config, resumed, signals)
    except BrokenPipeError:
        raise
    except (ValueError, TrainingError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (RuntimeError, MemoryError) as error:
        if (message := memory_message(error)) is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if step < config.total_steps:
        command = shlex.join(["python", *program, "--resume", config.output])
        say(f"stopped at step {step} of {config.total_steps} and saved; to go on:\n  {command}")
        return 128 + signals[0]
    return 0


def _resumed_config(given: dict[str, Any], resumed: dict[str, Any]) -> LaboratoryConfig:
    """As :func:`~fastgan.train.config.resumed_config`.

    Raises:
        ValueError: also for a --max-steps beyond the plan of the run, whose step size would then have fallen more slowly from the start.
    """
    # A checkpoint of before the epochs were saved says how many by its own --max-steps.
    saved = resumed["config"]
    saved |= {"epochs": LaboratoryConfig(epochs=saved["epochs"], max_steps=saved["max_steps"]).epochs}
    config = resumed_config(LaboratoryConfig, given, saved, resumed["step"])
    asked = given.get("max_steps") or 0
    if asked > config.planned_steps and asked != saved["max_steps"]:
        raise ValueError(
            f"--max-steps must be at most {config.planned_steps}, the steps over which this run was planned to let its learning "
            f"rates fall to 0, got {asked}; a longer run has to start anew"
        )
    return config


def _experiment(config: LaboratoryConfig, resumed: dict | None, signals: list[int]) -> int:
    """Returns the step at which the training ended, before the last one where there were ``signals``."""
    output = Path(config.output)
    claim = claim_folder(output)  # up to the end
    if not resumed or Path(config.resume).resolve() != output.resolve():
        prepare_folder(output)
    (output / "samples").mkdir(parents=True, exist_ok=True)
    write_json(output / "config.json", {"family": config.family} | dataclasses.asdict(config))

    lines = _Lines(config.data)

    def save(state: dict) -> None:
        content = {"family": config.family, "config": dataclasses.asdict(config)}
        save_checkpoint(output / "checkpoint.pt", {name: value for name, value in state.items() if name not in content} | content)
        write_atomically(output / "metrics.jsonl", lines(state["history"]))

    if resumed:  # in a folder of its own, too, and without what a killed run noted after its checkpoint
        save(resumed)
    torch.set_num_threads(config.threads)
    started = time.perf_counter()
    first = resumed["step"] if resumed else 0
    with contextlib.closing(Progress(first, config.total_steps)) as progress:
        trained = train(config, resumed=resumed, save=save, stop=lambda: signals, progress=progress)
    seconds = time.perf_counter() - started
    pictures.save_density(output / "density.png", trained)
    pictures.save_curves(output / "losses.png", trained)
    pictures.save_evolution(output, trained)
    if trained.steps[-1] < config.total_steps:
        return trained.steps[-1]
    summary = summarise(trained) | {"seconds": round(seconds, 2)}
    # A fixed generator one deviation beside the data and a little wider.
    fixed = Mixture((config.data.mean - config.data.std,), (1.3 * config.data.std,))
    x, found, optimal = fit_discriminator(config, fixed)
    summary["optimal_discriminator_error"] = float((found - optimal).abs().mean())
    pictures.save_optimal(output / "optimal.png", x, found, optimal, summary["optimal_discriminator_error"])
    norms = gradient_norms(config)
    summary["early_gradient_ratio"] = float((norms["non_saturating"] / norms["minimax"]).median())
    pictures.save_gradient_norms(output / "gradients.png", norms)
    write_json(output / "summary.json", summary)
    _report(summary, config, output)
    del claim
    return trained.steps[-1]


def summarise(trained: Run) -> dict:
    """What a run came to, by name: lists with a figure a seed, and counts over the seeds."""
    found = distances(trained.samples[-1], trained.config.data)
    passed = (found["mean_error"] < 0.1) & ((found["std_ratio"] - 1).abs() <= 0.3) & (found["ks"] < 0.15)
    data = trained.config.data
    low, high = data.limits(2)
    near = (trained.grid >= low) & (trained.grid <= high)
    boundary = (trained.curves[-1][:, near] - 0.5).abs().mean(1)
    return {name: [round(value, 4) for value in values.tolist()] for name, values in found.items()} | {
        "boundary_error": [round(value, 4) for value in boundary.tolist()],
        "passed": int(passed.sum()),
        "seeds": len(passed),
    }


class _Lines:
    """metrics.jsonl: a line a look with the median over the seeds of every figure but the speed."""

    def __init__(self, data: Mixture):
        self.data = data
        self.distances: dict[int, dict[str, float]] = {}  # by step: they take as long as two steps

    def __call__(self, history: dict[str, list]) -> bytes:
        """All lines of the file, from what :func:`~fastgan.laboratory.train` has its ``save`` called with."""
        lines = []
        for number, step in enumerate(history["steps"]):
            if step not in self.distances:
                found = distances(history["samples"][number], self.data)
                self.distances[step] = {name: float(value.median()) for name, value in found.items()}
            record = {"step": step, "epoch": max(1, math.ceil(step / STEPS_PER_EPOCH))} | self.distances[step]
            record |= median_figures(history, number)
            lines.append(json.dumps(record | {"images_per_second": history["images_per_second"][number]}) + "\n")
        return "".join(lines).encode()


def _report(summary: dict, config: LaboratoryConfig, output: Path) -> None:
    def median(name: str) -> float:
        return float(torch.tensor(summary[name]).median())

    print(f"{summary['seeds']} seeds x {config.total_steps} steps in {summary['seconds']:.1f} s; "
          f"{summary['passed']} of {summary['seeds']} pass ({CRITERION})")
    print(f"medians: |mean error| {median('mean_error'):.3f}  std ratio {median('std_ratio'):.2f}  KS {median('ks'):.3f}  "
          f"Wasserstein {median('wasserstein'):.3f}  JS {median('js'):.3f}")
    print(f"mean |D - 0.5| within two deviations: {median('boundary_error'):.3f}; discriminator fitted to a fixed generator: "
          f"mean |D - D*| {summary['optimal_discriminator_error']:.3f}")
    print(f"early gradient, non-saturating over minimax: {summary['early_gradient_ratio']:.1f}; figures in {output}")
