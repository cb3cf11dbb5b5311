"""Times the trainer's step on the CPU run in Python and repeated from its recording (fastgan/train/recording.py), in turn in one process.

    python benchmarks/bench_recording.py --threads 2

The embedded digits, default settings of each family but for what the table says. Before it is timed a pair has made the same steps from the
same seed, and their weights are compared: they must be equal to the bit. Printed are medians.
"""

import argparse
import statistics
import tempfile
import time

import torch
from bench_step import environment

from fastgan.train import CatGANConfig, DCGANConfig, GANConfig, Trainer

CASES = [
    (DCGANConfig, {}),
    (DCGANConfig, {"batch_size": 16}),
    (DCGANConfig, {"image_size": 64, "batch_size": 16}),
    (DCGANConfig, {"image_size": 32, "base_channels": 64}),
    (DCGANConfig, {"image_size": 32, "base_channels": 64, "precision": "bf16"}),
    (CatGANConfig, {}),
    (GANConfig, {"digit": 3}),
    (GANConfig, {"digit": 3, "gradient_penalty": 10.0}),
    (GANConfig, {"digit": 3, "r1": 1.0}),
    (GANConfig, {}),
    (CatGANConfig, {"architecture": "mlp"}),
    (CatGANConfig, {"architecture": "mlp", "labels": "0", "views": 1, "augment": False}),
]
COMPARED_STEPS, STEPS_IN_A_ROW = 10, 10


class Run:
    """A trainer and its next batches."""

    def __init__(self, config_class, settings, cpu_graph, threads, folder):
        config = config_class(device="cpu", threads=threads, cpu_graph=cpu_graph, output=folder, **settings)
        self.trainer = Trainer(config, config.load_data())
        self.batches, self.random, self.times = iter(()), torch.get_rng_state(), []

    def steps(self, count):
        """Makes so many, from the random numbers that its last one left."""
        torch.set_rng_state(self.random)
        for _ in range(count):
            batch = next(self.batches, None)
            if batch is None:
                self.batches = self.trainer.batches.epoch(self.trainer.step // len(self.trainer.batches))
                batch = next(self.batches)
            start = time.perf_counter()
            self.trainer.train_step(batch)
            self.times.append((time.perf_counter() - start) * 1e3)
            self.trainer.step += 1
        self.random = torch.get_rng_state()

    def weights(self):
        return [p.detach() for network in self.trainer.networks.values() for p in network.parameters()]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9, help="times that either makes ten steps (default: 9)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    arguments = parser.parse_args()
    print("\n".join(f"- {name}: {value}" for name, value in environment(arguments.threads).items()))
    print("\n| family | settings | in Python, ms | recorded, ms | ratio |\n|---|---|---:|---:|---:|")
    for config_class, settings in CASES:
        with tempfile.TemporaryDirectory() as folder:
            pair = [Run(config_class, settings, recorded, arguments.threads, f"{folder}/{recorded}") for recorded in (False, True)]
            for run in pair:
                run.steps(COMPARED_STEPS)
            if not pair[1].trainer.graph.captured or not all(map(torch.equal, pair[0].weights(), pair[1].weights())):
                raise SystemExit(f"{config_class.family} {settings}: not recorded, or the recorded steps differ from the others")
            for run in pair:
                run.times.clear()
            for _ in range(arguments.repeats):
                for run in pair:
                    run.steps(STEPS_IN_A_ROW)
            eager, recorded = (statistics.median(run.times) for run in pair)
        words = ", ".join(f"{name}={value}" for name, value in settings.items())
        print(f"| {config_class.family} | {words} | {eager:.2f} | {recorded:.2f} | {eager / recorded:.2f} |", flush=True)


if __name__ == "__main__":
    main()
