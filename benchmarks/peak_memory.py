"""Peak memory of a DCGAN training step, peer by peer.

    python benchmarks/peak_memory.py                     all cases of the training step in float32
    python benchmarks/peak_memory.py --cases grey28-b128-fp32 --peers eager trainer

torch.profiler records every allocation and release of PyTorch's CPU allocator, from before the networks are built to the
end of the sixth step (the trainer records its fourth and repeats the others from that); the figure is the most that was
allocated at once: weights, gradients, optimizer, images, activations and fastgan's workspaces. What oneDNN and MKL take
from the operating system behind PyTorch's back is not seen: it would add to eager's figure.
"""

import argparse
import gc
import json
import tempfile
from pathlib import Path

import torch
from bench_step import environment
from torch.profiler import ProfilerActivity, profile

from fastgan.bench import CASES, PEERS, Setting


def measure(case, peer):
    """Most bytes allocated at once."""
    gc.collect()  # what the last peer left would count as released by this one
    with tempfile.TemporaryDirectory() as folder:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            setting = Setting(case)
            step = setting.peer(peer, Path(folder))
            setting.networks = None  # what every peer has copied
            for _ in range(6):
                step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        most = max(most, allocated)
    return most


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    training = {case.name: case for case in CASES if not case.sampling}
    default = [name for name in training if name.endswith("fp32")]
    parser.add_argument("--cases", nargs="+", default=default, choices=training, metavar="CASE")
    parser.add_argument("--peers", nargs="+", default=["eager", "channels_last", "fuse", "trainer"], choices=PEERS)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    results = {}
    print("| case | peer | peak, MiB | of eager |\n|---|---|---:|---:|")
    for name in arguments.cases:
        eager = measure(training[name], "eager")
        results[name] = {}
        for peer in arguments.peers:
            results[name][peer] = peak = eager if peer == "eager" else measure(training[name], peer)
            print(f"| {name} | {peer} | {peak / 2**20:.0f} | {peak / eager:.0%} |", flush=True)
    if arguments.output:
        document = {"environment": environment(torch.get_num_threads()), "peak bytes": results}
        arguments.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
