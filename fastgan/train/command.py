"""A training run from a command line."""

import sys
from pathlib import Path

from fastgan.train.checkpoint import TrainingError, load_checkpoint
from fastgan.train.config import TrainConfig, parse_arguments, resumed_config
from fastgan.train.distributed import process_group
from fastgan.train.trainer import Trainer


def run(config_class: type[TrainConfig], arguments: list[str] | None = None) -> int:
    """Train as the command line says, as one of the processes of a run where torchrun started this one.

    Args:
        config_class: the settings of a model family.
        arguments: the command line without the program's name; None takes the process's.

    Returns:
        Exit status: 0 when trained to the end, 1 for an error (one line on standard error), 130 after
        an interrupt. Wrong flags exit with 2, as argparse does.
    """
    given = parse_arguments(config_class, arguments)
    try:
        with process_group() as ranks:
            try:
                if given.get("resume"):
                    path = Path(given["resume"]) / "checkpoint.pt"
                    checkpoint = ranks.on_main(lambda: load_checkpoint(path, config_class.family))
                    config = resumed_config(config_class, given, checkpoint["config"], checkpoint["step"])
                else:
                    checkpoint, config = None, config_class(**given)
                trainer = Trainer(config, config.load_data(), checkpoint)
            except ValueError as error:
                raise TrainingError(str(error)) from error
            trainer.train()
    except TrainingError as error:
        return _failed(error)
    except KeyboardInterrupt:
        return 130
    if ranks.main:
        print(f"step {trainer.step} of {trainer.total_steps}: results in {trainer.output}")
    return 0


def _failed(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 1
