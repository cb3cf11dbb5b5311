"""Is a single operator slower than PyTorch's for some shape? Layers drawn at random, in turn with PyTorch in both memory formats.

    python benchmarks/random_layers.py                          90 layers in float32, about a minute
    python benchmarks/random_layers.py --dtype bfloat16         under autocast
    python benchmarks/random_layers.py --output FILE            also writes the table, as Markdown

Kernel 4, stride 2, padding 1, with batch norm, forward or forward and backward; results are compared before they are timed. What is
slower is measured three times, of which the middle one counts. The table begins with the layers on which fastgan gains least: its time
and how many times as long PyTorch takes.
"""

import argparse
import random
import statistics
import time
from pathlib import Path

import torch
from bench_ops import REFERENCES, TOLERANCE, Layer, make_call
from bench_step import environment

from fastgan import ops

PEERS = ("fastgan", "pytorch_channels_last", "pytorch")
REPEATS = 7
LEAST_SECONDS = 0.004  # of a measurement: short calls are repeated
MOST_PRODUCTS, MOST_ELEMENTS = 4e9, 8e6  # of a layer, so that a run does not take long


def draw(number):
    """(layer, direction)"""
    op = number.choice([ops.conv2d_bn_act, ops.conv_transpose2d_bn_act])
    small, large = number.choice([16, 32, 48, 64, 128, 256, 512]), number.choice([1, 3, 16, 32, 48, 64, 128, 256])
    side, batch = number.choice([2, 3, 4, 5, 7, 8, 14, 16, 32, 64]), number.choice([1, 2, 4, 8, 16, 32, 64, 128])
    if batch * side**2 * 16 * small * large > MOST_PRODUCTS or batch * 4 * side**2 * large > MOST_ELEMENTS:
        return draw(number)
    transposed = op is ops.conv_transpose2d_bn_act
    channels, size = ((small, large), side) if transposed else ((large, small), 2 * side)
    return Layer(op, *channels, size, batch=batch), number.choice(["forward", "backward"])


def check(layer, direction, dtype):
    """At most twice PyTorch's error against float64, for the output and every gradient."""
    tensors = layer.tensors(dtype, torch.channels_last, torch.contiguous_format)
    exact = {name: tensor.detach().double().contiguous().requires_grad_() for name, tensor in tensors.items()}
    gradient = None

    def run(function, tensors, enabled=True):
        nonlocal gradient
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled and dtype == torch.bfloat16):
            output = function(**tensors, stride=layer.stride, padding=layer.padding)
        if direction == "forward":
            return [output]
        gradient = torch.randn_like(output, memory_format=torch.contiguous_format) if gradient is None else gradient
        return [output, *torch.autograd.grad(output, list(tensors.values()), gradient.to(output.dtype))]

    found, reference = run(layer.op, tensors), REFERENCES[layer.op]
    for ours, theirs, value in zip(found, run(reference, tensors), run(reference, exact, enabled=False)):
        least = TOLERANCE[dtype] * value.norm().clamp_min(1e-6)
        assert (ours - value).norm() <= (2 * (theirs - value).norm()).clamp_min(least), (layer, direction)


def measure(layer, direction, dtype):
    """Median seconds of a call, by peer."""
    calls = {peer: make_call(layer, peer, dtype, direction) for peer in PEERS}
    for call in calls.values():
        call()
    start = time.perf_counter()
    calls["fastgan"]()
    count = max(1, int(LEAST_SECONDS / (time.perf_counter() - start)))
    times = {peer: [] for peer in PEERS}
    for _ in range(REPEATS):
        for peer, call in calls.items():
            start = time.perf_counter()
            for _ in range(count):
                call()
            times[peer].append((time.perf_counter() - start) / count)
    return {peer: statistics.median(values) for peer, values in times.items()}


def gain(times):
    """Of fastgan over the faster format."""
    return min(times[peer] for peer in PEERS[1:]) / times["fastgan"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=90, help="layers (default: 90)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seed", type=int, default=0, help="of the layers (default: 0)")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    arguments = parser.parse_args()
    dtype, number, rows = getattr(torch, arguments.dtype), random.Random(arguments.seed), []
    for _ in range(arguments.count):
        layer, direction = draw(number)
        check(layer, direction, dtype)
        runs = [measure(layer, direction, dtype)]
        if gain(runs[0]) < 1:  # twice more: the cause may have been another process
            runs += [measure(layer, direction, dtype) for _ in range(2)]
        times = sorted(runs, key=gain)[len(runs) // 2]
        ratios = [times[peer] / times["fastgan"] for peer in PEERS[1:]]
        rows.append((gain(times), f"| {layer}, batch {layer.batch}, {direction} | {times['fastgan'] * 1e3:.2f} | "
                     + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |"))  # fmt: skip
    rows.sort()
    least = [ratio for ratio, _ in rows]
    text = "\n".join([
        "# Layers drawn at random", "",
        *(f"- {name}: {value}" for name, value in environment(torch.get_num_threads()).items()),
        f"- dtype: {arguments.dtype}", f"- seed: {arguments.seed}", "",
        f"{len(rows)} layers, median ratio to the faster format {statistics.median(least):.2f}; below 1: {sum(r < 1 for r in least)}",
        "", "| layer | fastgan, ms | channels_last | default format |", "|---|---:|---:|---:|", *(row for _, row in rows), "",
    ])  # fmt: skip
    print(text)
    if arguments.output:
        arguments.output.write_text(text)


if __name__ == "__main__":
    main()
