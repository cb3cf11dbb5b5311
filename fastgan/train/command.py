"""A training run from a command line."""

import sys
from pathlib import Path
from typing import Any

from fastgan._errors import memory_message, until_pipe_closes
from fastgan.train.checkpoint import TrainingError, load_checkpoint
from fastgan.train.config import TrainConfig, parse_arguments, resumed_checkpoint, resumed_config
from fastgan.train.distributed import process_group
from fastgan.train.trainer import Trainer


def run(config_class: type[TrainConfig], arguments: list[str] | None = None) -> int:
    """Train as the command line of a script says, as one of the processes of a run where torchrun started this one.

    Args:
        config_class: the settings of a model family.
        arguments: the command line without the program's name; None takes the process's.

    Returns:
        As :func:`train`. Wrong flags exit with 2, as argparse does.
    """
    given = parse_arguments(config_class, arguments)
    return until_pipe_closes(lambda: train(config_class, given, [sys.argv[0]]))


def train(config_class: type[TrainConfig], given: dict[str, Any], program: list[str]) -> int:
    """Train with these settings, or go on with a run.

    Args:
        config_class: the settings of a model family.
        given: those that are not to be the family's defaults, or the resumed run's.
        program: what Python is to run with --resume to go on with the run: a script, or ``-m`` and a module.

    Returns:
        Exit status: 0 when trained to the end, 1 for an error (one line on standard error), 130 after
        an interrupt. SIGTERM exits with 143, SIGHUP with 129.
    """
    try:
        with process_group() as ranks:
            try:
                if path := resumed_checkpoint(given):
                    checkpoint = ranks.on_main(lambda: _load(path, config_class.family))
                    config = resumed_config(config_class, given, checkpoint["config"], checkpoint["step"])
                else:
                    checkpoint, config = None, config_class(**given)
                trainer = Trainer(config, config.load_data(), checkpoint)
                trainer.program = program
            except ValueError as error:
                raise TrainingError(str(error)) from error
            trainer.train()
    except TrainingError as error:
        return _failed(error)
    except (RuntimeError, MemoryError) as error:
        if (message := memory_message(error)) is None:
            raise
        return _failed(message)
    except KeyboardInterrupt:
        return 130
    if ranks.main:
        step, total = trainer.step, trainer.total_steps
        reached = f"step {step} of {total}" if step <= total else f"step {step}, past the {total} asked for: nothing to train"
        print(f"{reached}: results in {trainer.output}")
    return 0


def _load(path: Path, family: str) -> dict[str, Any]:
    if not path.is_file():
        raise TrainingError(f"{path}: no checkpoint to resume from; start the run without --resume")
    return load_checkpoint(path, family)


def _failed(error: Exception | str) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 1
