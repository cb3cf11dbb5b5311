"""What the tests of training read of a run's files."""

import json
from pathlib import Path

import torch


def metrics(folder):
    """The records of metrics.jsonl."""
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def tensors(state, prefix=""):
    """All tensors of a nested state by their path."""
    if isinstance(state, torch.Tensor):
        return {prefix: state}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, (list, tuple)) else ()
    return {path: tensor for key, value in items for path, tensor in tensors(value, f"{prefix}/{key}").items()}
