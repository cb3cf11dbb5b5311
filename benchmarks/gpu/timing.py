"""Timing on a GPU, shared by the benchmarks of this folder (and a CPU clock, to try them without one)."""

import json
import platform
import statistics
import subprocess
import time
from pathlib import Path

import torch


def machine() -> dict:
    """What the numbers belong to."""
    facts = {
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "cpu_count": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        facts["cudnn"] = torch.backends.cudnn.version()
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        facts["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return facts


def write(path: Path, results: list[dict]) -> None:
    path.write_text(json.dumps({"machine": machine(), "results": results}, indent=1))


def _seconds(function, device: torch.device, calls: int) -> float:
    if device.type == "cpu":
        begin = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - begin) / calls
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls


def compare(candidates: dict, device: torch.device, rounds: int = 15, target_seconds: float = 0.02) -> dict:
    """Median and spread of each candidate's seconds a call.

    Candidates are taken in turn, so that a change of clock or temperature meets all of them. One round calls each as
    often as fits target_seconds.
    """
    calls = {}
    for name, function in candidates.items():
        for _ in range(3):
            function()
        calls[name] = max(1, int(target_seconds / max(_seconds(function, device, 3), 1e-7)))
    samples = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, function in candidates.items():
            samples[name].append(_seconds(function, device, calls[name]))
    return {
        name: {
            "median_s": statistics.median(values),
            "p20_s": sorted(values)[len(values) // 5],
            "p80_s": sorted(values)[len(values) * 4 // 5],
        }
        for name, values in samples.items()
    }
