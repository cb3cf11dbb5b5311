"""Times perceptrons of many sizes in PyTorch and on fastgan's linear_stack, which fuse() uses where it is faster.

    python benchmarks/bench_perceptron.py --threads 2

Networks of three equal layers, with leaky ReLU and with batch norm and leaky ReLU: forward and backward, and forward alone without
gradients. Both are compared before they are timed and then take turns; printed is how many times as fast the operator is
(training / forward), in brackets where fuse() does not use it. fastgan/ops/linear_stack.py takes its limits from these tables.
"""

import argparse
import copy
import statistics
import time

import torch
from bench_step import environment
from torch import nn

import fastgan
from fastgan.ops import linear_stack

LAYERS, FLOPS = 3, 2e8  # layers of a network; work of one timing, about
WIDTHS, ROWS = (64, 128, 256, 512, 1024, 2048), (8, 12, 32, 64, 128, 256, 512, 1024, 4096)
LIMITS = {"_FEWEST_ROWS": 2, "_MOST_ROWS": 10**6, "_WEIGHTS": 0, "_WEIGHTS_WITH_NORM": 0}  # none


def network(width, norm):
    torch.manual_seed(0)
    layers = []
    for _ in range(LAYERS):
        layers += [nn.Linear(width, width, not norm), *([nn.BatchNorm1d(width)] if norm else []), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers)


def train(net, x):
    net.zero_grad()
    net(x).sum().backward()


@torch.no_grad()
def forward(net, x):
    net(x)


def ratio(function, plain, fused, x, repeats):
    """Median of the ratios of neighbouring timings."""
    calls = max(1, int(FLOPS / (6 * LAYERS * plain[0].weight.numel() * len(x))))

    def timed(net):
        start = time.perf_counter()
        for _ in range(min(calls, 50)):
            function(net, x)
        return time.perf_counter() - start

    for net in (plain, fused):
        timed(net)
    return statistics.median(timed(plain) / timed(fused) for _ in range(repeats))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--repeats", type=int, default=9, help="timings of each (default: 9)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    used = {name: getattr(linear_stack, name) for name in LIMITS}
    vars(linear_stack).update(LIMITS)
    print("\n".join(f"- {name}: {value}" for name, value in environment(arguments.threads).items()))
    for norm in (False, True):
        print(f"\n{'Batch norm and leaky ReLU' if norm else 'Leaky ReLU'}\n")
        print("| width | " + " | ".join(f"{rows} rows" for rows in ROWS) + " |\n|---:|" + "---:|" * len(ROWS))
        for width in WIDTHS:
            cells = []
            for rows in ROWS:
                plain = network(width, norm)
                fused, x = fastgan.fuse(copy.deepcopy(plain)), torch.randn(rows, width)
                torch.testing.assert_close(fused(x), plain(x), rtol=1e-3, atol=1e-3)
                cell = " / ".join(f"{ratio(f, plain, fused, x, arguments.repeats):.2f}" for f in (train, forward))
                vars(linear_stack).update(used)
                taken = linear_stack.linear_stack_gains(rows, LAYERS * width**2, norm)
                vars(linear_stack).update(LIMITS)
                cells.append(cell if taken else f"({cell})")
            print(f"| {width} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
