"""Times a training step of a CatGAN of perceptrons in fastgan and in plain PyTorch, in turn in one process.

    python benchmarks/bench_catgan.py --threads 2

The classifier is 784-1000-500-250-250-250-10 with batch norm, leaky ReLU and Gaussian noise on its input and hidden
layers, the generator 100-500-500-784; 100 real, 100 generated and 100 labeled images a step, Adam. The classifier's
step normalises them as one batch, the generator's by the running statistics (fastgan's --joint-batch-norm). Before anything is
timed, every peer makes six steps from the same weights, images and latent vectors, with the noise turned off (each
draws its own), and its losses are compared with those of `eager`. Then each in turn makes ten steps, so that weights
and Adam's averages are in the cache as they are in a training, and the first is not counted. Printed are medians, the
20th and 80th percentile and how many times as fast as `eager`; and, for comparison, the time that
PyTorch takes for the step's matrix products alone.

Peers:
    eager          the paper's losses in plain PyTorch, Adam as it comes
    tuned          eager with Adam in one kernel, and no gradients for the classifier's weights in the generator's step
    fuse           eager's loop on fastgan.fuse(network)
    trainer        fastgan's trainer (fastgan.train.Trainer.train_step), without its averaged weights
"""

import argparse
import copy
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from bench_step import environment
from torch.nn import functional as F

import fastgan
from fastgan.bench import summary
from fastgan.data import Batch, ImageDataset, normalize
from fastgan.models import catgan
from fastgan.nn import GaussianNoise
from fastgan.train import Trainer
from fastgan.train.catgan import CatGANConfig

BATCH, LATENT_DIM, LEARNING_RATE, BETAS = 100, 100, 1e-3, (0.5, 0.999)
STEPS_IN_A_ROW = 10
PEERS = ("eager", "tuned", "fuse", "trainer")
CHECKED_STEPS = 6  # of which the trainer repeats the last from its recording
# Largest differences of a loss, relative to the largest, in the first two of them and in all: Adam's first steps are as long for a gradient
# of rounding errors as for any other, and each step starts where the last has led.
TOLERANCES = {2: 1e-3, CHECKED_STEPS: 1e-2}


def entropies(logits):
    log_p = F.log_softmax(logits, 1)
    p = log_p.exp()
    q = p.mean(0)
    return -(p * log_p).sum(1).mean(), -(q * (q + 1e-12).log()).sum()


class Setting:
    """What all peers start from."""

    def __init__(self):
        torch.manual_seed(0)
        self.networks = catgan(28, 1, 10, LATENT_DIM, "mlp")
        self.images = torch.rand(BATCH, 1, 28, 28) * 2 - 1
        labeled = torch.randint(256, (BATCH, 1, 28, 28), dtype=torch.uint8)
        self.labeled = Batch(labeled, torch.arange(BATCH) % 10)

    def peer(self, name, noise, folder):
        """A function that makes one step and returns its two losses."""
        networks = copy.deepcopy(self.networks)
        if not noise:
            for module in networks[1].modules():
                if isinstance(module, GaussianNoise):
                    module.std = 0.0
        if name == "trainer":
            return self.trainer(noise, folder)
        if name == "fuse":
            networks = [fastgan.fuse(network) for network in networks]
        return self.eager(*networks, tuned=name == "tuned")

    def eager(self, generator, classifier, tuned):
        labeled_images = normalize(self.labeled.images)
        norms = [module for module in classifier.modules() if isinstance(module, torch.nn.BatchNorm1d)]
        optimizers = [
            torch.optim.Adam(network.parameters(), LEARNING_RATE, betas=BETAS, fused=tuned or None)
            for network in (generator, classifier)
        ]

        def step():
            fake = generator(torch.randn(BATCH, LATENT_DIM))
            chosen = torch.randint(BATCH, (BATCH,))
            images = torch.cat([self.images, labeled_images[chosen], fake.detach()])
            real_logits, labeled_logits, fake_logits = classifier(images).split(BATCH)
            conditional, marginal = entropies(real_logits)
            loss_d = conditional - marginal - entropies(fake_logits)[0]
            loss_d = loss_d + F.cross_entropy(labeled_logits, self.labeled.labels[chosen])
            optimizers[1].zero_grad()
            loss_d.backward()
            optimizers[1].step()
            if tuned:
                classifier.requires_grad_(False)
            for norm in norms:
                norm.eval()
            conditional, marginal = entropies(classifier(fake))
            for norm in norms:
                norm.train()
            loss_g = conditional - marginal
            optimizers[0].zero_grad()
            loss_g.backward()
            optimizers[0].step()
            if tuned:
                classifier.requires_grad_(True)
            return torch.stack([loss_d.detach(), loss_g.detach()])

        return step

    def trainer(self, noise, folder):
        config = CatGANConfig(
            architecture="mlp", labels=str(BATCH), labeled_batch=BATCH, batch_size=BATCH, latent_dim=LATENT_DIM, views=1,
            augment=False, ema=0, decay=0, learning_rate=LEARNING_RATE, beta1=BETAS[0], beta2=BETAS[1], device="cpu",
            input_noise=None if noise else 0.0, hidden_noise=None if noise else 0.0, output=str(folder),
        )  # fmt: skip
        images, labels = (torch.cat([part, part]) for part in self.labeled)
        trainer = Trainer(config, ImageDataset("digits", images, labels))
        for network, start in zip(trainer.networks.values(), self.networks):
            tensors = zip(network.state_dict().values(), start.state_dict().values())
            for tensor, value in tensors:
                tensor.copy_(value)
        trainer.objective.labeled = self.labeled

        def step():
            figures = trainer.train_step(Batch(self.images, None))
            return torch.stack([figures["loss_d"], figures["loss_g"]])

        return step


def check(setting, peers, folder):
    """Steps from one seed: each sees the updates of those before."""
    expected = None
    for name in ("eager", *(peer for peer in peers if peer != "eager")):
        step = setting.peer(name, False, folder)
        torch.manual_seed(2)
        found = torch.stack([step() for _ in range(CHECKED_STEPS)])
        expected = found if expected is None else expected
        for steps, tolerance in TOLERANCES.items():
            difference = ((found - expected)[:steps].abs().max() / expected[:steps].abs().max()).item()
            if not difference <= tolerance:
                raise SystemExit(f"{name} differs from eager by {difference:.2g} in {steps} steps: {found} and {expected}")


def timed(clock, function):
    start = clock()
    function()
    return (clock() - start) * 1e3


def products(networks):
    """A function that makes the matrix products no step can do without: all passes, and no gradients for the
    classifier's weights in the generator's step."""
    generator, classifier = ([module.weight for module in network.modules() if isinstance(module, torch.nn.Linear)]
                             for network in networks)
    passes = [(generator, BATCH, True, False), (classifier, 3 * BATCH, True, False), (classifier, BATCH, False, True)]
    calls = []
    for weights, rows, for_weights, for_images in passes:
        for number, weight in enumerate(weights):
            weight = weight.detach()
            x, gradient = torch.randn(rows, weight.shape[1]), torch.randn(rows, weight.shape[0])
            calls.append((x, weight.T))
            if for_weights:
                calls.append((gradient.T, x))
            if number or for_images:
                calls.append((gradient, weight))

    def run():
        for left, right in calls:
            torch.mm(left, right)

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", default=PEERS, choices=PEERS, metavar="PEER", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--repeats", type=int, default=5, help="times that every peer makes ten steps (default: 5)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--processor-time", action="store_true",
                        help="CPU time of the process in place of the clock's, for a machine with other work")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    setting = Setting()
    with tempfile.TemporaryDirectory() as folder:
        check(setting, arguments.peers, Path(folder))
        steps = {name: setting.peer(name, True, Path(folder)) for name in arguments.peers}
    clock = time.process_time if arguments.processor_time else time.perf_counter
    times = {name: [] for name in steps}
    order = list(steps)
    for repeat in range(-1, arguments.repeats):  # a round to warm up
        random.shuffle(order)
        for name in order:
            taken = [timed(clock, steps[name]) for _ in range(STEPS_IN_A_ROW)]
            if repeat >= 0:
                times[name] += taken[1:]
    print("\n".join(f"- {name}: {value}" for name, value in environment(arguments.threads).items()))
    kind = "processor time" if arguments.processor_time else "time"
    print(f"\n| peer | {kind}, median, ms | 20–80%, ms | speed against eager |\n|---|---:|---:|---:|")
    for name, taken in times.items():
        result = summary(taken)
        ratio = f"{statistics.median(times['eager']) / result['median']:.2f}" if "eager" in times else "–"
        print(f"| {name} | {result['median']:.1f} | {result['p20']:.1f}–{result['p80']:.1f} | {ratio} |")
    if "eager" in times:
        run_products = products(setting.networks)
        floor = statistics.median(timed(clock, run_products) for _ in range(5 * STEPS_IN_A_ROW))
        print(f"| PyTorch's matrix products alone | {floor:.1f} | | {statistics.median(times['eager']) / floor:.2f} |")


if __name__ == "__main__":
    main()
