"""Where the time of a DCGAN training step goes, in PyTorch and in fastgan: a table and a picture.

    python benchmarks/profile_step.py --output benchmarks/results/profile      also writes profile.json and profile.png

torch.profiler's own time of every operator, by what it does, in milliseconds a step (medians do not apply: it is the mean
of the steps profiled). Profiling itself takes a few per cent, which is in `other`.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from bench_step import environment
from torch.profiler import ProfilerActivity, profile

from fastgan.bench import CASES, PEERS, Setting
from fastgan.train.graph import WARM_UP

# The first pattern found in an operator's name decides.
PARTS = {
    "convolution, forward": ("mkldnn_convolution", "thnn_conv", "slow_conv"),
    "convolution, backward": ("convolution_backward",),
    "convolution and its gradients (fused)": ("conv4x4s2_down", "conv4x4s2_up", "conv4x4s2_weight_gradient"),
    "weights packed": ("conv4x4s2_pack",),
    "batch norm": ("batch_norm", "batch_statistics"),
    "activation": ("relu", "tanh", "sigmoid", "threshold", "scale_shift_act"),
    "batch norm and activation, own passes (fused)": ("bn_act_backward",),
    "layers from and to one pixel": ("aten::mm", "aten::addmm", "from_pixel", "to_pixel"),
    "optimizer": ("_foreach", "_fused_adam", "Optimizer", "adam"),
}
OTHER = "other"


def part_of(name):
    # Backward first: its name contains that of the forward operator.
    for part in sorted(PARTS, key=lambda part: part != "convolution, backward"):
        if any(pattern in name for pattern in PARTS[part]):
            return part
    return OTHER


def profile_peer(case, peer, steps):
    """{part: ms a step}"""
    with tempfile.TemporaryDirectory() as folder:
        step = Setting(case).peer(peer, Path(folder))
        for _ in range(WARM_UP + 1):  # the trainer records the last of them, if any
            step()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for _ in range(steps):
                step()
    parts = dict.fromkeys([*PARTS, OTHER], 0.0)
    for event in profiler.key_averages():
        parts[part_of(event.key)] += event.self_cpu_time_total / 1e3 / steps
    return parts


def picture(results, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [(case, peer) for case, peers in results.items() for peer in peers]
    figure, axes = plt.subplots(figsize=(9, 0.5 * len(rows) + 2))
    colours = plt.get_cmap("tab10")
    shown = [part for part in [*PARTS, OTHER] if any(results[case][peer][part] > 0 for case, peer in rows)]
    whole = {case: max(sum(parts.values()) for parts in peers.values()) for case, peers in results.items()}
    for i, part in enumerate(shown):
        left = [sum(results[case][peer][p] for p in shown[:i]) / whole[case] for case, peer in rows]
        width = [results[case][peer][part] / whole[case] for case, peer in rows]
        axes.barh(range(len(rows)), width, left=left, color=colours(i), label=part)
    for y, (case, peer) in enumerate(rows):
        total = sum(results[case][peer].values())
        axes.text(total / whole[case] + 0.01, y, f"{total:.0f} ms", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [f"{case}\n{peer}" for case, peer in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15)
    axes.set_xlabel("time of a training step, against the slowest peer of its case")
    axes.legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.45, -0.5 / len(rows) - 0.08))
    figure.savefig(path, dpi=110, bbox_inches="tight")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    training = {case.name: case for case in CASES if not case.sampling}
    parser.add_argument("--cases", nargs="+", default=["rgb64-b64-fp32", "grey28-b128-fp32"], choices=training)
    parser.add_argument("--peers", nargs="+", default=["eager", "channels_last", "trainer"], choices=PEERS)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--output", type=Path, help="JSON and PNG to write, without suffix")
    arguments = parser.parse_args()
    results = {}
    for name in arguments.cases:
        results[name] = {peer: profile_peer(training[name], peer, arguments.steps) for peer in arguments.peers}
        print(f"### {name}\n\n| ms a step | {' | '.join(arguments.peers)} |\n|---|{'---:|' * len(arguments.peers)}")
        for part in [*PARTS, OTHER]:
            figures = [results[name][peer][part] for peer in arguments.peers]
            if any(figures):
                print(f"| {part} | {' | '.join(f'{figure:.1f}' for figure in figures)} |")
        print(
            f"| all | {' | '.join(f'{sum(results[name][peer].values()):.1f}' for peer in arguments.peers)} |\n",
            flush=True,
        )
    if arguments.output:
        machine = environment(torch.get_num_threads())
        document = {"environment": machine, "milliseconds": results}
        arguments.output.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
        picture(results, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
