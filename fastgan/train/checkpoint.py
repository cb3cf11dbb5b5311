"""Files that are either the old or the new version, whatever happens while they are written."""

import contextlib
import io
import os
import secrets
import zipfile
from pathlib import Path
from typing import Any

import torch


# What the trainer's and the laboratory's checkpoints hold.
_PARTS = (
    {"config", "step", "data", "random", "networks", "optimizers", "scalers", "averaged"},
    {"config", "step", "random", "weights", "history"},
)


class TrainingError(RuntimeError):
    """A run that cannot start or go on; the message says why and what to do."""


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file in one step that also survives a power cut, where the file system can sync a folder.

    Raises:
        TrainingError: the file cannot be written; the old one is still there.
    """
    # A name of its own: another process may write the same file, as one of a cache.
    part = path.with_name(f"{path.name}.{secrets.token_hex(8)}.part")
    try:
        try:
            with open(part, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:
            with contextlib.suppress(OSError):  # what went wrong before says more
                part.unlink()
            raise
    except OSError as error:
        kept = " (the previous one is kept)" if path.exists() else ""
        raise TrainingError(f"{path} cannot be written: {error.strerror or error}{kept}") from error
    with contextlib.suppress(OSError):  # the file is in its place; some file systems do not sync folders
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically. Raises TrainingError."""
    # Into memory first: a full disk then meets plain file writing and not torch's zip writer,
    # which cannot give up cleanly.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, buffer.getbuffer())


def load_checkpoint(path: str | Path, family: str | None = None) -> dict[str, Any]:
    """Read a checkpoint, of a model family where one is given, onto the CPU.

    Raises:
        TrainingError: there is none, it is damaged, or it is of another family.
    """
    path = Path(path)
    if not path.is_file():
        raise TrainingError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums that torch.save writes
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    # Both raise errors of many kinds on damaged files.
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise TrainingError(f"{path}: damaged, or not a checkpoint ({reason})") from error
    if not isinstance(state, dict) or "family" not in state:
        raise TrainingError(f"{path}: not a checkpoint of a fastgan run")
    if family is not None and state["family"] != family:
        raise TrainingError(f"{path}: a checkpoint of family {state['family']!r}, expected {family!r}")
    if not any(parts <= state.keys() for parts in _PARTS):
        raise TrainingError(f"{path}: not a checkpoint of a fastgan run, which holds more than {', '.join(map(str, state))}")
    return state
