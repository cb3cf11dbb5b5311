"""The training step and sampling of a DCGAN in fastgan and in plain PyTorch, timed in turn in one process.

`fastgan bench` times one case; benchmarks/bench_step.py times them all with these functions and writes the results down.

Before anything is timed, every peer makes two training steps from the same weights, images and noise, and its losses
are compared with those of `eager`. Then each peer makes one step in turn, so that a change of the machine's load meets
all of them. Peers, all with the networks of fastgan.models.dcgan and Adam:
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
import copy
import platform
import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fastgan._arguments import set_threads
from fastgan._extension import build_info
from fastgan.data import Batch, ImageDataset
from fastgan.models import dcgan
from fastgan.nn import fuse
from fastgan.train import DCGANConfig, Trainer
from fastgan.train.graph import WARM_UP

LATENT_DIM = 100
PYTORCH_PEERS = ("eager", "channels_last", "compile", "tuned", "compile_tuned")
PEERS = (*PYTORCH_PEERS, "fuse", "fuse_compile", "trainer")
# Largest relative difference of a loss in the first step; bfloat16 has 8 bits of precision. Adam's first updates have the
# sign of the gradient, also where it is rounding alone, so that the second step may differ five times as much.
TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}
SECOND_STEP = 5


@dataclass(frozen=True)
class Case:
    image_size: int
    channels: int
    batch_size: int
    precision: str
    sampling: bool = False
    base_channels: int = 64

    @property
    def name(self):
        kind = "sample-" if self.sampling else ""
        return f"{kind}{'rgb' if self.channels == 3 else 'grey'}{self.image_size}-b{self.batch_size}-{self.precision}"

    @property
    def peers(self):
        return tuple(peer for peer in PEERS if peer not in (("tuned", "compile_tuned", "trainer") if self.sampling else ()))

    def autocast(self):
        return torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16")


SIZES = ((64, 3, 64), (64, 3, 16), (32, 1, 128), (28, 1, 128))  # image size, channels, batch
CASES = [
    *(Case(*size, precision) for size in SIZES for precision in ("fp32", "bf16")),
    *(Case(*SIZES[0], precision, sampling=True) for precision in ("fp32", "bf16")),
]


class Setting:
    """What all peers of a case start from."""

    def __init__(self, case):
        torch.manual_seed(0)
        self.case = case
        self.networks = dcgan(case.image_size, case.channels, LATENT_DIM, case.base_channels)
        self.images = torch.rand(case.batch_size, case.channels, case.image_size, case.image_size) * 2 - 1

    def peer(self, name, folder):
        """A function that makes one step and returns what is compared: the losses, or the images."""
        if name == "trainer":
            return self.trainer(folder)
        generator, discriminator = copy.deepcopy(self.networks)
        images = self.images
        if name in ("channels_last", "tuned", "compile_tuned"):
            generator, discriminator = (net.to(memory_format=torch.channels_last) for net in (generator, discriminator))
            images = images.contiguous(memory_format=torch.channels_last)
        if name.startswith("fuse"):
            generator, discriminator = fuse(generator), fuse(discriminator)
        if "compile" in name:
            generator, discriminator = torch.compile(generator), torch.compile(discriminator)
        if self.case.sampling:
            return self.sampler(generator)
        return self.training_step(generator, discriminator, images, tuned=name.endswith("tuned"))

    def sampler(self, generator):
        generator.eval()
        z = torch.randn(self.case.batch_size, LATENT_DIM, generator=torch.Generator().manual_seed(1))

        @torch.no_grad()
        def sample():
            with self.case.autocast():
                return generator(z)

        return sample

    def training_step(self, generator, discriminator, images, tuned):
        optimizers = [
            torch.optim.Adam(net.parameters(), 2e-4, betas=(0.5, 0.999), fused=tuned) for net in (generator, discriminator)
        ]

        def step():
            z = torch.randn(self.case.batch_size, LATENT_DIM)
            with self.case.autocast():
                fake = generator(z)
                loss_d = cross_entropy(discriminator(images), 1) + cross_entropy(discriminator(fake.detach()), 0)
            optimizers[1].zero_grad()
            loss_d.backward()
            optimizers[1].step()
            if tuned:
                discriminator.requires_grad_(False)
            with self.case.autocast():
                loss_g = cross_entropy(discriminator(fake), 1)
            optimizers[0].zero_grad()
            loss_g.backward()
            optimizers[0].step()
            if tuned:
                discriminator.requires_grad_(True)
            return torch.stack([loss_d.detach(), loss_g.detach()])

        return step

    def trainer(self, folder):
        case = self.case
        config = DCGANConfig(
            image_size=case.image_size, channels=case.channels, batch_size=case.batch_size, precision=case.precision,
            latent_dim=LATENT_DIM, base_channels=case.base_channels, learning_rate=2e-4, ema=0, device="cpu",
            output=str(folder),
        )  # fmt: skip
        placeholder = torch.zeros(self.images.shape, dtype=torch.uint8)
        trainer = Trainer(config, ImageDataset("digits", placeholder, None))
        for net, start in zip(trainer.networks.values(), self.networks):
            net.load_state_dict(start.state_dict())

        def step():
            figures = trainer.train_step(Batch(self.images, None))
            return torch.stack([figures["loss_d"], figures["loss_g"]])

        return step


def cross_entropy(logits, label):
    return F.binary_cross_entropy_with_logits(logits.float(), torch.full_like(logits, label, dtype=torch.float32))


def check(case, name, step, expected):
    """Two steps from one seed: the second sees the first one's updates. Also warms up and compiles."""
    torch.manual_seed(2)
    found = torch.stack([step(), step()]).float()
    if expected is None:
        return found
    largest = [values.flatten(1).abs().amax(1) for values in (found - expected, expected)]
    first, second = (largest[0] / largest[1]).tolist()
    difference = max(first, second / SECOND_STEP)
    if not difference <= TOLERANCE[case.precision]:
        raise ValueError(f"{case.name}: {name} differs from eager by {difference:.2g}: losses {found.tolist()} and {expected.tolist()}")
    return expected


def useful_flops(setting):
    """Floating-point operations of one step without the gradients nobody needs, as direct convolutions count."""
    torch.manual_seed(2)
    step = setting.peer("tuned", None)
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def run_case(case, peers, repeats, clock=time.perf_counter):
    """{peer: {"median", "p20", "p80": milliseconds by clock, "times": [...]}} and the FLOPs of one step."""
    torch._dynamo.reset()
    setting = Setting(case)
    steps, expected = {}, None
    with tempfile.TemporaryDirectory() as folder:
        for name in ("eager", *(peer for peer in peers if peer != "eager")):
            step = setting.peer(name, Path(folder))
            expected = check(case, name, step, expected)
            if name in peers:
                steps[name] = step
            if name == "trainer":
                for _ in range(WARM_UP):  # until it repeats what it has recorded
                    step()
    times = {name: [] for name in steps}
    order = list(steps)
    for _ in range(repeats):
        random.shuffle(order)
        for name in order:
            start = clock()
            steps[name]()
            times[name].append((clock() - start) * 1e3)
    return {name: summary(taken) for name, taken in times.items()}, useful_flops(setting)


def summary(times):
    cuts = statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else times * 4
    return {"median": statistics.median(times), "p20": cuts[0], "p80": cuts[3], "times": times}


def table(case, peers, flops):
    """Markdown: one row a peer."""
    pytorch = [peers[name]["median"] for name in PYTORCH_PEERS if name in peers]
    lines = [f"### {case}", "", "| peer | median, ms | 20–80%, ms | GFLOP/s | speed against the fastest PyTorch |",
             "|---|---:|---:|---:|---:|"]  # fmt: skip
    for name, result in peers.items():
        ratio = f"{min(pytorch) / result['median']:.2f}" if pytorch else "–"
        lines.append(
            f"| {name} | {result['median']:.1f} | {result['p20']:.1f}–{result['p80']:.1f} "
            f"| {flops / result['median'] / 1e6:.0f} | {ratio} |"
        )
    return "\n".join(lines) + "\n"


def environment(threads):
    """What the timings depend on, by name."""
    info = build_info()
    return {
        "machine": processor_name(),
        "threads": threads,
        "instruction set": info["cpu_isa"],
        "fastgan": info["version"],
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def processor_name():
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = [case.name for case in CASES]
    parser.add_argument("--case", choices=names, default="grey32-b128-fp32", metavar="CASE",
                        help=f"one of {', '.join(names)} (default: grey32-b128-fp32)")  # fmt: skip
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=("eager", "channels_last", "tuned", "fuse", "trainer"),
                        metavar="PEER", help=f"any of {', '.join(PEERS)} (default: all without compile)")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=10, metavar="INT", help="timed steps of each peer (default: 10)")
    parser.add_argument("--threads", type=int, metavar="INT", help="CPU threads; by default PyTorch's choice")


def run(options: argparse.Namespace) -> int:
    """Print the table of one case."""
    if options.repeats < 1:
        raise ValueError(f"--repeats must be at least 1, got {options.repeats}")
    set_threads(options.threads)
    case = next(case for case in CASES if case.name == options.case)
    for name, value in environment(torch.get_num_threads()).items():
        print(f"{name}: {value}")
    times, flops = run_case(case, [peer for peer in options.peers if peer in case.peers], options.repeats)
    print(f"\n{table(case.name, times, flops)}", end="")
    return 0
