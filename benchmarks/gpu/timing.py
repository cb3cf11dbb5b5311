"""Timing on a GPU, shared by the benchmarks of this folder (and a CPU clock, to try them without one)."""

import functools
import json
import platform
import statistics
import subprocess
import time
from contextlib import contextmanager
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
        facts["driver"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return facts


class Results:
    """Rows and failures of one benchmark, written as they come: what ends it early loses only what was not yet run."""

    def __init__(self, path: Path):
        self.path, self.rows, self.failures, self.machine = path, [], [], machine()

    def add(self, row: dict) -> None:
        self.rows.append(row)
        self.write()

    def write(self) -> None:
        content = {"machine": self.machine, "results": self.rows, "failures": self.failures}
        self.path.write_text(json.dumps(content, indent=1))

    @contextmanager
    def surviving(self, name: str):
        """A failure inside is printed and kept; the benchmark goes on."""
        try:
            yield
        except Exception as error:  # noqa: BLE001
            message = f"{name}: {type(error).__name__}: {str(error).strip()[:300]}"
            print(f"FAILED {message}", flush=True)
            self.failures.append(message)
            self.write()

    def exit(self) -> None:
        raise SystemExit(f"{len(self.failures)} failed" if self.failures else 0)


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    ours, theirs = (t.double() if t.numel() < 1 << 26 else t.float() for t in (ours, theirs))
    return ((ours - theirs).norm() / theirs.norm().clamp_min(1e-30)).item()


def check(error: float, bound: float) -> float:
    if not error < bound:
        raise ValueError(f"differs from the peer by {error:.3g}, at most {bound:g} is allowed")
    return error


def captured(function, device: torch.device, calls: int = 1):
    """So many calls as one CUDA graph; calling the result replays it. On a CPU: a plain loop."""
    if device.type == "cpu":

        def repeated():
            for _ in range(calls):
                function()

        return repeated
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is set up once, as cuDNN's choice of an algorithm, cannot be captured
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    # What the graph works on belongs to the function, and must live as long.
    return functools.partial(_replay, graph, function)


def _replay(graph, function):
    graph.replay()


def seconds_per_call(function, device: torch.device, calls: int) -> float:
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


def compare(
    candidates: dict, device: torch.device, rounds: int = 9, target_seconds: float = 0.01, inside: int = 1
) -> dict:
    """Median and spread of each candidate's seconds a call.

    Candidates are taken in turn, so that a change of clock or temperature meets all of them. One round calls each as
    often as fits target_seconds. inside: what is timed are so many calls in one, as captured() makes them.
    """
    calls = {}
    for name, function in candidates.items():
        for _ in range(3):
            function()
        calls[name] = max(1, int(target_seconds / max(seconds_per_call(function, device, 3), 1e-7)))
    samples = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, function in candidates.items():
            samples[name].append(seconds_per_call(function, device, calls[name]) / inside)
    return {
        name: {
            "median_s": statistics.median(values),
            "p20_s": sorted(values)[len(values) // 5],
            "p80_s": sorted(values)[len(values) * 4 // 5],
        }
        for name, values in samples.items()
    }
