"""`fastgan export`: a trained generator as a file that is used without fastgan."""

import argparse
import contextlib
import copy
import io
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from fastgan._extras import require
from fastgan.models.dcgan import DCGANGenerator
from fastgan.models.gan import MLPGenerator, StackedLinear
from fastgan.nn import fold_batch_norm
from fastgan.sample import load_generator

# Largest difference of a pixel, in images of [-1, 1], between the file and the generator. Rounding makes about 1e-6.
TOLERANCE = 1e-4
# Batches that the file is run with; one of them is a single image.
CHECKED_BATCHES = (16, 1)


class ExportError(RuntimeError):
    """A generator that cannot be exported, or a file that does not do what the generator does."""


def plain_generator(generator: nn.Module, number: int | None = None) -> nn.Sequential:
    """A generator as an ``nn.Sequential`` of torch's layers, batch norm folded in, in eval mode.

    Args:
        generator: of :mod:`fastgan.models`.
        number: which of several networks side by side, from 0.

    Returns:
        Latent vectors [N, latent_dim] to images, as the generator; its weights are copies.

    Raises:
        ExportError: networks side by side without the number of one of them.
    """
    layers = list(generator.main)
    if isinstance(generator, DCGANGenerator):
        layers = [nn.Unflatten(1, (generator.latent_dim, 1, 1)), *layers]
    elif isinstance(generator, MLPGenerator):
        layers = [_one_of(layer, number) if isinstance(layer, StackedLinear) else layer for layer in layers]
        layers.append(nn.Unflatten(1, generator.data_shape))
    return fold_batch_norm(nn.Sequential(*layers))


def _one_of(layer: StackedLinear, number: int | None) -> nn.Linear:
    copies, fan_in, fan_out = layer.weight.shape
    if number is None or not 0 <= number < copies:
        raise ExportError(
            f"the checkpoint holds {copies} networks side by side, one a digit: choose one by --digit 0 to {copies - 1}"
        )
    linear = nn.Linear(fan_in, fan_out)
    linear.weight = nn.Parameter(layer.weight[number].detach().T.contiguous())
    linear.bias = nn.Parameter(layer.bias[number, 0].detach().clone())
    return linear


def write_onnx(network: nn.Sequential, path: Path, metadata: dict[str, str]) -> Callable[[Tensor], Tensor]:
    """Write an ONNX file with input ``z`` and output ``images``; returns what runs it, in onnxruntime."""
    onnx = require("onnx", "onnx", "--format onnx")
    require("onnxscript", "onnx", "--format onnx")
    runtime = require("onnxruntime", "onnx", "--format onnx")
    with _silent_exporter():
        program = torch.onnx.export(
            network, (_example(network),), dynamo=True, input_names=["z"], output_names=["images"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )  # fmt: skip
    onnx.helper.set_model_props(model := program.model_proto, metadata)
    onnx.checker.check_model(model, full_check=True)
    onnx.save_model(model, path)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda z: torch.from_numpy(session.run(["images"], {"z": z.numpy()})[0])


def write_torch(network: nn.Sequential, path: Path, metadata: dict[str, str]) -> Callable[[Tensor], Tensor]:
    """Write an exported program, which ``torch.export.load(path).module()`` reads; returns what runs it."""
    program = torch.export.export(network, (_example(network),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, path, extra_files={"metadata.json": json.dumps(metadata)})
    return torch.export.load(path).module()


def write_safetensors(network: nn.Sequential, path: Path, metadata: dict[str, str]) -> Callable[[Tensor], Tensor]:
    """Write the weights, with their names in the Sequential; returns what runs them, in such layers."""
    safetensors = require("safetensors.torch", "safetensors", "--format safetensors")
    path.write_bytes(safetensors.save({name: value.contiguous() for name, value in network.state_dict().items()}, metadata))
    loaded = copy.deepcopy(network)
    for parameter in loaded.parameters():
        parameter.zero_()
    loaded.load_state_dict(safetensors.load_file(path))
    return loaded


FORMATS = {"onnx": write_onnx, "torch": write_torch, "safetensors": write_safetensors}


@contextlib.contextmanager
def _silent_exporter() -> Iterator[None]:
    """torch's exporter prints its progress, warns of its own deprecations, and logs which other libraries it misses."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _example(network: nn.Sequential) -> Tensor:
    """Two latent vectors: a batch of one would be taken for a constant."""
    return torch.zeros(2, _latent_dim(network))


def _latent_dim(network: nn.Sequential) -> int:
    first = network[0]
    return first.unflattened_size[0] if isinstance(first, nn.Unflatten) else first.in_features


@torch.no_grad()
def export(path: str | os.PathLike, format: str, out: str | os.PathLike, *, digit: int | None = None) -> float:
    """Write the generator of a checkpoint (the averaged weights where it has them) and check the file.

    The file's network is in eval mode, has its batch norms folded in, and takes batches of any size. Its metadata say
    the model family, the step, the latent vectors' length and distribution, and the layers.

    Args:
        path: the checkpoint, or the folder of its run.
        format: ``"onnx"``, ``"torch"`` (an exported program) or ``"safetensors"`` (weights alone).
        out: the file; an older one is replaced when the new one has been checked.
        digit: which network of a GAN of ten digits.

    Returns:
        The largest difference of a pixel between the file and the generator as it was trained.

    Raises:
        ExportError: the two do not agree, or a choice is missing.
        ModuleNotFoundError: a library that the format needs is not installed.
        TrainingError: no checkpoint, or one without a generator of images.
    """
    config, generator = load_generator(path)
    if config.side_by_side == 1 and digit is not None:
        raise ExportError(f"--digit {digit}: the checkpoint holds one network; leave it out")
    network = plain_generator(generator, digit)
    metadata = {
        "family": config.family,
        "latent_dim": str(config.latent_dim),
        "latent_distribution": config.latent_distribution,
        "image_shape": json.dumps(config.image_shape),
        "layers": "\n".join(repr(layer) for layer in network),
    }
    out = Path(out)
    if out.is_dir():
        raise ExportError(f"--out {out}: is a folder; name a file")
    if not out.parent.is_dir():
        raise ExportError(f"--out {out}: no such folder: {out.parent}")
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        written = Path(folder) / f"generator{_SUFFIXES[format]}"
        exported = FORMATS[format](network, written, metadata)
        error = max(_difference(config, generator, exported, batch, digit) for batch in CHECKED_BATCHES)
        if not error <= TOLERANCE:
            raise ExportError(f"{out} was not written: its images differ from the generator's by {error:.2g}")
        os.replace(written, out)
    return error


# torch.export insists on its own.
_SUFFIXES = {"onnx": ".onnx", "torch": ".pt2", "safetensors": ".safetensors"}


def _difference(config, generator: nn.Module, exported: Callable[[Tensor], Tensor], batch: int, digit: int | None) -> float:
    """Of a pixel at most, over a batch of images."""
    z = config.latent(batch, torch.Generator().manual_seed(batch))
    copies = config.side_by_side
    expected = generator(z.repeat(copies, 1))
    if copies > 1:
        expected = expected.unflatten(0, (copies, batch))[digit]
    return float((exported(z) - expected).abs().max())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="a run's folder, or its checkpoint.pt")
    parser.add_argument("--format", required=True, choices=FORMATS, help="onnx, an exported program of torch, or the "
                        "weights alone")  # fmt: skip
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="file to write")
    parser.add_argument("--digit", type=int, choices=range(10), help="which network, of a GAN of ten digits side by side")


def run(options: argparse.Namespace) -> int:
    error = export(options.checkpoint, options.format, options.out, digit=options.digit)
    size = options.out.stat().st_size
    print(f"{options.out}: {size / 1e6:.1f} MB; largest difference of a pixel to the trained generator {error:.1e}")
    return 0
