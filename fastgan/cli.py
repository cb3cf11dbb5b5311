"""The command `fastgan`.

Every command but `train` and `info` is a module with `add_arguments(parser)` and `run(options) -> exit status`,
imported when it is asked for: the trainer, its pictures and its metrics take seconds to load.
"""

import argparse
import importlib
import json
import sys

from fastgan import build_info
from fastgan._errors import memory_message, until_pipe_closes

_DESCRIPTION = """\
Train GANs on fused kernels, and use what was trained.

  fastgan train dcgan                                          handwritten digits, in runs/dcgan
  fastgan sample --checkpoint runs/dcgan --out digits.png      a grid of new ones"""
_EPILOG = """\
`fastgan COMMAND --help` lists the options of a command.
Exit status: 0 done, 1 an error (one line on standard error), 2 wrong arguments, 130 interrupted (Ctrl-C), 143 terminated, 129 hung up."""
_COMMANDS = {
    "train": ("train a model, or resume a run (--resume)", None),
    "sample": ("draw a grid of images from a checkpoint", "fastgan.sample"),
    "evaluate": ("score generators and held-out images; prints one line of JSON for each", "fastgan.metrics.command"),
    "export": ("write a trained generator for use without fastgan", "fastgan.export"),
    "bench": ("time a training step in fastgan and in plain PyTorch on this machine", "fastgan.bench"),
    "info": ("print what was built, and why", None),
}
_FAMILIES = {
    "dcgan": "convolutional GAN on images (Radford et al. 2015)",
    "gan": "GAN of multilayer perceptrons, ten digits side by side (Goodfellow et al. 2014)",
    "catgan": "classifier from few labels, or none (Springenberg 2015)",
    "gaussian": "one-dimensional GANs, with pictures of what they learn",
}


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: the command line without the program's name; None takes the process's.

    Returns:
        Exit status: 0 done, 1 an error (one line on standard error), 130 interrupted. Wrong arguments exit with 2, a training
        run that SIGTERM or SIGHUP ends with 143 or 129.
    """
    words = sys.argv[1:] if arguments is None else arguments
    options = _parser(words).parse_args(words)
    try:
        return until_pipe_closes(lambda: options.run(options))
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, ImportError, RuntimeError, MemoryError) as error:
        message = memory_message(error)
        # PyTorch raises RuntimeError for bugs; fastgan's own kinds are messages to the user.
        if message is None and isinstance(error, RuntimeError) and not type(error).__module__.startswith("fastgan."):
            raise
        print(f"error: {message or error}", file=sys.stderr)
        return 1


def _parser(words: list[str]) -> argparse.ArgumentParser:
    """The parser with the arguments of the command in `words` alone."""
    parser = argparse.ArgumentParser(
        "fastgan", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"fastgan {build_info()['version']}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (help, module_name) in _COMMANDS.items():
        command = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
        if name not in words[:1]:
            continue
        if name == "train":
            _add_families(command, words[1:])
        elif name == "info":
            command.add_argument("--json", action="store_true", help="as JSON")
            command.set_defaults(run=_info)
        else:
            module = importlib.import_module(module_name)
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser


def _add_families(parser: argparse.ArgumentParser, words: list[str]) -> None:
    families = parser.add_subparsers(title="model families", metavar="FAMILY", required=True)
    for name, help in _FAMILIES.items():
        family = families.add_parser(name, help=help)
        if name in words[:1]:
            from fastgan.train.config import add_options

            if name == "gaussian":
                from fastgan.laboratory.command import foreign_flag

                if (message := foreign_flag(words[1:])) is not None:
                    family.exit(2, f"error: {message}\n")
            config_class, train = _family(name)
            family.description = config_class.__doc__.splitlines()[0]
            add_options(family, config_class)
            family.set_defaults(run=lambda options: train({key: value for key, value in vars(options).items() if key != "run"}))


def _family(name: str):
    """The settings of a family, and the function that trains with those given."""
    if name == "gaussian":
        from fastgan.laboratory import LaboratoryConfig
        from fastgan.laboratory.command import experiment

        return LaboratoryConfig, lambda given: experiment(given, ["-m", "fastgan", "train", name])
    from fastgan.train.command import train
    from fastgan.train.families import FAMILIES

    return FAMILIES[name], lambda given: train(FAMILIES[name], given, ["-m", "fastgan", "train", name])


def _info(options: argparse.Namespace) -> int:
    info = build_info()
    if options.json:
        print(json.dumps(info, indent=2))
    else:
        for key, value in info.items():
            print(f"{key:20} {', '.join(value) or 'none' if isinstance(value, (list, tuple)) else value}")
    return 0
