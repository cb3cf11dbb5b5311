"""Times a DCGAN training step, and sampling, in fastgan and in plain PyTorch, in turn in one process.

    python benchmarks/bench_step.py                                  everything; about 20 minutes on two cores
    python benchmarks/bench_step.py --cases 'rgb64-*fp32' --peers eager channels_last fuse trainer --repeats 5

Before anything is timed, every peer makes two training steps from the same weights, images and noise, and its losses
are compared with those of `eager`. Then each peer makes one step in turn, so that a change of the machine's load meets
all of them. Printed are the median, the 20th and 80th percentile, the speed in GFLOP/s (counted as direct convolution
and without the gradients nobody needs) and its share of the machine's peak, measured as the best float32 matrix product,
and how many times as fast as the fastest PyTorch peers, the plain ones and all of them; the same with machine, versions and date goes to benchmarks/results/ as JSON and Markdown.

Peers, all with the networks of fastgan.models.dcgan and Adam:
    eager          the loop of PyTorch's DCGAN example, default layout
    channels_last  the same in channels_last
    compile        the same under torch.compile
    tuned          channels_last, fused Adam, and no gradients for the discriminator's weights in the generator's step
    compile_tuned  the same under torch.compile
    fuse           eager's loop on fastgan.fuse(network)
    fuse_compile   the same under torch.compile
    trainer        fastgan's trainer (fastgan.train.Trainer.train_step), without its averaged weights
"""

import argparse
import datetime
import fnmatch
import json
import subprocess
import time
from pathlib import Path

import torch
from roofline import measured_peak

from fastgan import bench
from fastgan.bench import CASES, PEERS, PYTORCH_PEERS, run_case


def table(case, peers, flops, peak):
    """Markdown: one row a peer; peak: what the machine multiplies at best, GFLOP/s in float32."""
    header = (
        "| peer | median, ms | 20–80%, ms | GFLOP/s | of the peak "
        "| against the fastest of eager, channels_last, compile | against the fastest PyTorch, tuned too |"
    )
    lines = [f"### {case}", "", header, "|---|---:|---:|---:|---:|---:|---:|"]
    for name, result in peers.items():
        speed = flops / result["median"] / 1e6
        ratios = []
        for group in (PYTORCH_PEERS[:3], PYTORCH_PEERS):
            times = [peers[peer]["median"] for peer in group if peer in peers]
            ratios.append(f"{min(times) / result['median']:.2f}" if times else "–")
        lines.append(
            f"| {name} | {result['median']:.1f} | {result['p20']:.1f}–{result['p80']:.1f} "
            f"| {speed:.0f} | {speed / peak:.0%} | {' | '.join(ratios)} |"
        )
    return "\n".join(lines) + "\n"


def environment(threads):
    """What the timings depend on, by name."""
    machine = {"date": datetime.date.today().isoformat()} | bench.environment(threads)
    commit = subprocess.run(
        ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"], capture_output=True, text=True
    ).stdout.strip()
    machine["fastgan"] = f"{machine['fastgan']} {commit}".strip()
    return machine


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [case.name for case in CASES]
    parser.add_argument("--cases", nargs="+", default=["*"], metavar="PATTERN", help=f"of {', '.join(names)}")
    parser.add_argument("--peers", nargs="+", default=PEERS, choices=PEERS, metavar="PEER", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--repeats", type=int, default=15, help="timed steps of every peer (default: 15)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument(
        "--processor-time", action="store_true",
        help="time that the processor gave, not that passed: for a busy machine, with --threads 1",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, help="files to write, without suffix (default: results/step_DATE)")
    arguments = parser.parse_args()
    cases = [case for case in CASES if any(fnmatch.fnmatch(case.name, pattern) for pattern in arguments.cases)]
    if not cases:
        parser.error(f"--cases: none of {', '.join(names)} matches {' '.join(arguments.cases)}")
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.processor_time else time.perf_counter

    peak = measured_peak(clock)
    machine = environment(arguments.threads) | {
        "peak": f"{peak:.0f} GFLOP/s, best float32 matrix product",
        "clock": "processor time" if arguments.processor_time else "elapsed time",
    }
    output = arguments.output or Path(__file__).parent / "results" / f"step_{machine['date']}"
    output.parent.mkdir(parents=True, exist_ok=True)
    header = "# A DCGAN training step\n\n" + "\n".join(f"- {name}: {value}" for name, value in machine.items()) + "\n"
    print(header, flush=True)
    results, tables = {}, []
    for case in cases:
        peers = [peer for peer in arguments.peers if peer in case.peers]
        if not peers:
            continue
        try:
            times, flops = run_case(case, peers, arguments.repeats, clock)
        except ValueError as error:  # a peer computes something else
            raise SystemExit(str(error)) from error
        results[case.name] = {"flops": flops, "peers": times}
        tables.append(table(case.name, times, flops, peak))
        print(tables[-1], flush=True)
        # After every case: a run that is cut short keeps what it measured.
        output.with_suffix(".json").write_text(json.dumps({"environment": machine, "cases": results}, indent=1) + "\n")
        output.with_suffix(".md").write_text("\n".join([header, *tables]))
    print(f"written: {output.with_suffix('.json')} and .md")


if __name__ == "__main__":
    main()
