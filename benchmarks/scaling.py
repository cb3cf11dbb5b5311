"""How the cost of a DCGAN training step grows with batch, image size and width: a table and a picture.

    python benchmarks/scaling.py --output benchmarks/results/scaling      also writes scaling.json, .md and .png

One of the three is changed at a time; peers take turns, a few repeats each, after their losses were compared.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from bench_step import environment

from fastgan.bench import PEERS, Case, run_case

# What is changed: the cases.
SERIES = {
    "batch size": [Case(32, 1, batch, "fp32") for batch in (1, 4, 16, 64, 256)],
    "image size": [Case(size, 3, 16, "fp32") for size in (28, 32, 48, 64, 128)],
    "base channels": [Case(32, 1, 64, "fp32", base_channels=base) for base in (32, 64, 128)],
}
FIELDS = {"batch size": "batch_size", "image size": "image_size", "base channels": "base_channels"}
FIXED = {
    "batch size": "32 px grey, base 64",
    "image size": "RGB, base 64, batch 16",
    "base channels": "32 px grey, batch 64",
}


def table(series, results, peers):
    header = f"| {series} | {' | '.join(f'{peer}, ms' for peer in peers)} | {peers[-1]} against the fastest other |"
    lines = [f"### {series} ({FIXED[series]})", "", header, f"|---:|{'---:|' * (len(peers) + 1)}"]
    for value, times in results.items():
        ratio = min(times[peer] for peer in peers[:-1]) / times[peers[-1]]
        lines.append(f"| {value} | {' | '.join(f'{times[peer]:.1f}' for peer in peers)} | {ratio:.2f} |")
    return "\n".join(lines) + "\n"


def picture(results, peers, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(10, 3.2))
    for axis, (series, points) in zip(axes, results.items()):
        for peer in peers:
            axis.plot(list(points), [times[peer] for times in points.values()], marker="o", markersize=3, label=peer)
        axis.set(xscale="log", yscale="log", xlabel=series, title=FIXED[series])
        axis.title.set_fontsize(9)
        axis.set_xticks(list(points), [str(value) for value in points])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("ms a training step")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--series", nargs="+", default=list(SERIES), choices=SERIES)
    parser.add_argument("--peers", nargs="+", default=["eager", "channels_last", "trainer"], choices=PEERS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON, Markdown and PNG to write, without suffix")
    parser.add_argument("--processor-time", action="store_true", help="as in bench_step.py; on one thread")
    arguments = parser.parse_args()
    clock = time.perf_counter
    if arguments.processor_time:
        torch.set_num_threads(1)
        clock = time.process_time
    if len(arguments.peers) < 2:
        parser.error("--peers: at least two are compared")
    results, tables = {}, []
    for series in arguments.series:
        results[series] = {}
        for case in SERIES[series]:
            times, _ = run_case(case, arguments.peers, arguments.repeats, clock)
            results[series][getattr(case, FIELDS[series])] = {peer: times[peer]["median"] for peer in arguments.peers}
        tables.append(table(series, results[series], arguments.peers))
        print(tables[-1], flush=True)
    if arguments.output:
        machine = environment(torch.get_num_threads())
        machine["clock"] = "processor time" if arguments.processor_time else "elapsed time"
        document = {"environment": machine, "medians, ms": results}
        arguments.output.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
        header = "# Growth of a training step\n\n" + "\n".join(f"- {name}: {value}" for name, value in machine.items())
        arguments.output.with_suffix(".md").write_text("\n".join([header + "\n", *tables]))
        picture(results, arguments.peers, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
