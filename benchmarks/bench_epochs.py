"""Times an epoch of the vector GAN, in plain PyTorch and in fastgan, and one of the DCGAN, in one process.

    python benchmarks/bench_epochs.py --dataset mnist --data-root DIR --threads 2

Before anything is timed, the plain loop and fastgan's make three steps from the same weights, images and noise, and
their losses are compared. The vector GANs take an epoch in turn, --repeats times; printed are medians. The DCGAN's
epoch is timed once, after ten steps that warm up.

Peers of the vector GAN, all with the networks of fastgan.models.mlp_gan:
    plain, one digit      the usual loop: nn.Linear, Adam, batches from one tensor
    plain, ten digits     the same, digit after digit
    fastgan, one digit    fastgan's trainer
    fastgan, ten digits   fastgan's trainer, ten GANs side by side
"""

import argparse
import statistics
import tempfile
import time

import torch
from torch.nn import functional as F

from fastgan.data import DATASETS, ImageDataset, load_dataset
from fastgan.train import DCGANConfig, GANConfig, Trainer

# The digit that the single GANs learn.
DIGIT = 2


class PlainLoop:
    """The GAN of one digit as a PyTorch tutorial would write it."""

    def __init__(self, config: GANConfig, dataset: ImageDataset):
        torch.manual_seed(config.seed)
        self.generator, self.discriminator, _ = config.build(dataset)
        self.optimizers = [torch.optim.Adam(network.parameters(), config.learning_rate, (config.beta1, config.beta2))
                           for network in (self.generator, self.discriminator)]
        self.config = config
        self.images = dataset.images[dataset.labels == config.digit].float() / 127.5 - 1

    def step(self, real: torch.Tensor) -> tuple[float, float]:
        z = torch.rand(len(real), self.config.latent_dim) * 2 - 1
        fake = self.generator(z)
        losses = []
        for optimizer, loss in zip(reversed(self.optimizers), (self.loss_d, self.loss_g)):
            optimizer.zero_grad()
            value = loss(real, fake)
            value.backward()
            optimizer.step()
            losses.append(value.item())
        return tuple(losses)

    def loss_d(self, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        real, fake = self.discriminator(real), self.discriminator(fake.detach())
        return (F.binary_cross_entropy_with_logits(real, torch.ones_like(real))
                + F.binary_cross_entropy_with_logits(fake, torch.zeros_like(fake)))

    def loss_g(self, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        fake = self.discriminator(fake)
        return F.binary_cross_entropy_with_logits(fake, torch.ones_like(fake))

    def epoch(self) -> None:
        order = torch.randperm(len(self.images))
        for chosen in order.split(self.config.batch_size)[: len(order) // self.config.batch_size]:
            self.step(self.images[chosen])


def trained(trainer: Trainer, epoch: int = 0) -> None:
    for batch in trainer.batches.epoch(epoch):
        trainer.train_step(batch)


def check(plain: PlainLoop, trainer: Trainer) -> None:
    for step, batch in zip(range(3), trainer.batches.epoch(0)):
        torch.manual_seed(step)
        expected = plain.step(batch.images)
        torch.manual_seed(step)
        figures = trainer.train_step(batch)
        torch.testing.assert_close((float(figures["loss_d"]), float(figures["loss_g"])), expected, rtol=1e-4, atol=1e-5)


def seconds(function) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", choices=[name for name in DATASETS if name != "folder"], default="digits")
    parser.add_argument("--data-root", metavar="DIR")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3, help="epochs of each vector GAN (default: 3)")
    parser.add_argument("--image-size", type=int, default=28, help="of the DCGAN (default: 28)")
    parser.add_argument("--base-channels", type=int, default=32, help="of the DCGAN (default: 32)")
    parser.add_argument("--batch-size", type=int, default=32, help="of the DCGAN (default: 32)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dataset = load_dataset(arguments.dataset, arguments.data_root)

    with tempfile.TemporaryDirectory() as folder:
        def gan(digit: int | None, name: str) -> GANConfig:
            return GANConfig(digit=digit, device="cpu", ema=0, threads=arguments.threads, output=f"{folder}/{name}")

        plain = [PlainLoop(gan(digit, ""), dataset) for digit in range(10)]
        one, ten = (Trainer(gan(digit, name), dataset) for digit, name in ((DIGIT, "one"), (None, "ten")))
        check(plain[DIGIT], one)
        peers = {
            "plain, one digit": plain[DIGIT].epoch,
            "plain, ten digits": lambda: [loop.epoch() for loop in plain],
            "fastgan, one digit": lambda: trained(one),
            "fastgan, ten digits": lambda: trained(ten),
        }
        times = {name: [] for name in peers}
        for _ in range(arguments.repeats):
            for name, epoch in peers.items():
                times[name].append(seconds(epoch))
        medians = {name: statistics.median(values) for name, values in times.items()}

        images = load_dataset(arguments.dataset, arguments.data_root, image_size=arguments.image_size)
        dcgan = Trainer(DCGANConfig(
            image_size=arguments.image_size, base_channels=arguments.base_channels, batch_size=arguments.batch_size,
            device="cpu", ema=0, threads=arguments.threads, output=f"{folder}/dcgan",
        ), images)
        for _, batch in zip(range(10), dcgan.batches.epoch(0)):
            dcgan.train_step(batch)
        medians["DCGAN"] = seconds(lambda: trained(dcgan, 1))

    print(f"{arguments.dataset}, {len(dataset)} images, {arguments.threads} threads, PyTorch {torch.__version__}")
    for name, value in medians.items():
        print(f"epoch of {name:20} {value:8.3f} s")
    for name in ("one digit", "ten digits"):
        plain, ours = medians[f"plain, {name}"], medians[f"fastgan, {name}"]
        print(f"{name}: fastgan is {plain / ours:.2f} times as fast as the plain loop; the DCGAN's epoch takes "
              f"{medians['DCGAN'] / ours:.1f} times as long")


if __name__ == "__main__":
    main()
