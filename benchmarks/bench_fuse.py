"""Times a training step of networks with a forward of their own, plain and fused, in turn in one process.

    python benchmarks/bench_fuse.py [--batch-size 16] [--repeats 7] [--compile]

Forward and backward of one network with a squared loss. The outputs are compared before anything is timed. Prints
medians in milliseconds and the ratio plain / fused; --compile adds the fused network under torch.compile.
"""

import argparse
import copy
import statistics
import time

import torch
from torch import nn
from torch.nn import functional as F

import fastgan
from fastgan.models import dcgan


class FunctionalDCGAN(nn.Module):
    """The generator of a 64-pixel DCGAN, written with functions."""

    def __init__(self, width=64):
        super().__init__()
        widths = [8 * width, 4 * width, 2 * width, width]
        self.first = nn.ConvTranspose2d(100, widths[0], 4, 1, 0, bias=False)
        self.convs = nn.ModuleList([nn.ConvTranspose2d(a, b, 4, 2, 1, bias=False) for a, b in zip(widths, widths[1:])])
        self.norms = nn.ModuleList([nn.BatchNorm2d(channels) for channels in widths])
        self.last = nn.ConvTranspose2d(width, 3, 4, 2, 1, bias=False)

    def forward(self, z):
        x = F.relu(self.norms[0](self.first(z)))
        for conv, norm in zip(self.convs, self.norms[1:]):
            x = F.relu(norm(conv(x)))
        return torch.tanh(self.last(x))


class UpsampleGenerator(nn.Module):
    """Nearest neighbours and 3 x 3 convolutions, 32 pixels."""

    def __init__(self, width=32):
        super().__init__()
        self.project = nn.Linear(100, 4 * width * 64)
        self.width = width
        sizes = ((4, 2), (2, 1))
        self.convs = nn.ModuleList([nn.Conv2d(a * width, b * width, 3, padding=1, bias=False) for a, b in sizes])
        self.norms = nn.ModuleList([nn.BatchNorm2d(b * width) for b in (2, 1)])
        self.last = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, z):
        x = self.project(z.flatten(1)).view(-1, 4 * self.width, 8, 8)
        for conv, norm in zip(self.convs, self.norms):
            x = F.leaky_relu(norm(conv(F.interpolate(x, scale_factor=2))), 0.2)
        return torch.tanh(self.last(x))


LATENT, IMAGE = (100, 1, 1), (3, 64, 64)
CASES = {  # name -> network, shape of an input
    "functional generator, 64 px": (FunctionalDCGAN, LATENT),
    "upsample generator, 32 px": (UpsampleGenerator, LATENT),
    "Sequential generator, 64 px": (lambda: dcgan(64, 3)[0], LATENT),
    "Sequential discriminator, 64 px": (lambda: dcgan(64, 3)[1], IMAGE),
}


def step(network, x):
    network(x).square().mean().backward()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=CASES)
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads, {fastgan.build_info()['cpu_isa']}")
    for case in arguments.cases:
        torch.manual_seed(0)
        build, shape = CASES[case]
        plain = build()
        peers = {"plain": plain, "fused": fastgan.fuse(copy.deepcopy(plain))}
        if arguments.compile:
            peers["compiled"] = torch.compile(fastgan.fuse(copy.deepcopy(plain)), fullgraph=True)
        x = torch.randn(arguments.batch_size, *shape)
        expected = plain(x)
        for name, network in peers.items():
            torch.testing.assert_close(network(x), expected, rtol=1e-3, atol=1e-4, msg=name)
            step(network, x)
        times = {name: [] for name in peers}
        for _ in range(arguments.repeats):
            for name, network in peers.items():
                started = time.perf_counter()
                step(network, x)
                times[name].append(1e3 * (time.perf_counter() - started))
        medians = {name: statistics.median(values) for name, values in times.items()}
        for name, median in medians.items():
            print(f"{case:31} {name:9} {median:8.1f} ms   plain / this: {medians['plain'] / median:.2f}", flush=True)


if __name__ == "__main__":
    main()
