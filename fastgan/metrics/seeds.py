"""`python -m fastgan.metrics.seeds RUN ...`: a figure's mean and standard deviation over runs that differ by seed."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fastgan.metrics.clustering import mean_and_std

# Settings that may differ between runs of one experiment; they do not change what a run computes but for its seed.
MAY_DIFFER = ("seed", "output", "resume", "data_root", "threads", "log_every", "checkpoint_every")


def last_figures(runs: list[Path], figure: str) -> dict[int, float]:
    """The last value of a figure in each run.

    Args:
        runs: output folders of finished training runs that differ by their seed alone.
        figure: its name in metrics.jsonl, such as ``"test_error"``.

    Returns:
        Value by seed.

    Raises:
        ValueError: a folder without a run or without that figure, a run that is not finished, two runs of one seed, or
            runs that differ in another setting.
    """
    values: dict[int, float] = {}
    first: dict[str, Any] | None = None
    for run in runs:
        try:
            config = json.loads((run / "config.json").read_text())
            records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"{run} does not hold a training run: {error}") from error
        found = [record for record in records if figure in record]
        if not found:
            names = sorted({name for record in records for name in record})
            raise ValueError(f"{run}: no figure {figure!r} in metrics.jsonl; there are {', '.join(names)}")
        steps, limit = records[-1]["step"], config.get("max_steps")
        if found[-1]["epoch"] != config["epochs"] and not (limit and steps >= limit):
            reached = f"it is at step {steps} of {limit}" if limit else f"{figure} is of epoch {found[-1]['epoch']} of {config['epochs']}"
            raise ValueError(f"{run} is not finished: {reached}")
        settings = {name: value for name, value in config.items() if name not in MAY_DIFFER}
        first = first or settings
        differing = [name for name in first | settings if first.get(name) != settings.get(name)]
        if differing:
            raise ValueError(f"{run} differs from {runs[0]} in more than its seed: {', '.join(differing)}")
        if config["seed"] in values:
            raise ValueError(f"{run}: seed {config['seed']} is there twice")
        values[config["seed"]] = found[-1][figure]
    return values


def main(arguments: list[str] | None = None) -> int:
    """The command. Prints a line a run and one with mean and sample standard deviation.

    Args:
        arguments: the command line without the program's name; None takes the process's.

    Returns:
        Exit status: 0, or 1 for an error.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition(": ")[2])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output folder of a run")
    parser.add_argument("--figure", default="test_error", metavar="NAME", help="in metrics.jsonl (default: test_error)")
    given = parser.parse_args(arguments)
    try:
        values = last_figures(given.runs, given.figure)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for seed, value in values.items():
        print(f"seed {seed}: {value:.4g}")
    mean, deviation = mean_and_std(list(values.values()))
    print(f"{given.figure}: {mean:.4g} ± {deviation:.2g} over {len(values)} seeds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
