"""What the three entropies of a CatGAN do: two moons without labels, and the loss without each term in turn.

Writes runs/catgan_toy/ablation.png in under a minute: colors tell which category the classifier believes in and how
surely (white: not at all), gray points are data, black ones generated.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from fastgan._errors import until_pipe_closes
from fastgan.losses import catgan_generator_loss
from fastgan.nn import GaussianNoise
from fastgan.ops import softmax_entropy

LATENT_DIM, POINTS, BATCH = 2, 1000, 100
# Weights of -H[mean p(x)], mean H[p(x)] and -mean H[p(G(z))] in the discriminator's loss.
VARIANTS = {
    "all three terms": (1, 1, 1),
    "without H[mean p(x)]\nnothing asks for two categories": (0, 1, 1),
    "without mean H[p(x)]\nnothing asks to be sure about data": (1, 0, 1),
    "without mean H[p(G(z))]\nnothing asks to be unsure off the data": (1, 1, 0),
}


def two_moons(count: int) -> tuple[Tensor, Tensor]:
    """Points [count, 2] on two half circles that reach into each other, and which one each is on, [count]."""
    moon = torch.arange(count) % 2
    sign = 1.0 - 2 * moon
    angle = math.pi * torch.rand(count)
    points = sign[:, None] * torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], 1)
    return points + 0.08 * torch.randn(count, 2), moon


def networks() -> tuple[nn.Module, nn.Module]:
    generator = nn.Sequential(
        nn.Linear(LATENT_DIM, 64), nn.BatchNorm1d(64), nn.ReLU(),
        nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 2),
    )  # fmt: skip
    classifier = nn.Sequential(
        GaussianNoise(0.1), nn.Linear(2, 64), nn.BatchNorm1d(64), nn.LeakyReLU(0.2),
        nn.Linear(64, 64), nn.BatchNorm1d(64), nn.LeakyReLU(0.2), nn.Linear(64, 2),
    )  # fmt: skip
    return generator, classifier


def train(points: Tensor, weights: tuple[float, float, float], steps: int, seed: int) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(seed)
    generator, classifier = networks()
    optimizers = [
        torch.optim.Adam(network.parameters(), rate, betas=(0.5, 0.999), fused=True)
        for network, rate in ((generator, 1e-3), (classifier, 2e-3))
    ]
    schedules = [  # falls linearly to 0 over the second half
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, 2 - 2 * step / steps)) for optimizer in optimizers
    ]
    for_marginal, for_real, for_fake = weights
    for _ in range(steps):
        fake = generator(torch.randn(BATCH, LATENT_DIM))
        conditional, marginal = softmax_entropy(classifier(points[torch.randint(len(points), (BATCH,))]))
        fake_conditional, _ = softmax_entropy(classifier(fake.detach()))
        optimizers[1].zero_grad()
        (for_real * conditional - for_marginal * marginal - for_fake * fake_conditional).backward()
        optimizers[1].step()
        optimizers[0].zero_grad()
        catgan_generator_loss(classifier(fake)).backward()
        optimizers[0].step()
        for schedule in schedules:
            schedule.step()
    update_bn([points], classifier)
    return generator.eval(), classifier.eval()


@torch.no_grad()
def draw(axis, points: Tensor, moon: Tensor, generator: nn.Module, classifier: nn.Module, title: str) -> None:
    x, y = torch.linspace(-2, 2, 200), torch.linspace(-1.5, 1.5, 150)
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), 2)
    axis.imshow(
        classifier(grid.view(-1, 2)).softmax(1)[:, 0].view(150, 200).numpy(),
        cmap="RdBu", vmin=0, vmax=1, origin="lower", extent=(-2, 2, -1.5, 1.5),
    )  # fmt: skip
    fake = generator(torch.randn(300, LATENT_DIM))
    axis.plot(*points[::3].T.numpy(), ".", color="dimgray", markersize=3)
    axis.plot(*fake.T.numpy(), ".", color="black", markersize=1.5)
    agreement = (classifier(points).argmax(1) == moon).float().mean().item()
    axis.set(title=f"{title}\nerror {100 * min(agreement, 1 - agreement):.1f}%", xlim=(-2, 2), ylim=(-1.5, 1.5))
    axis.set(xticks=(), yticks=())
    print(f"{title.splitlines()[0]}: error {100 * min(agreement, 1 - agreement):.1f}%", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="decides points, networks and noise")
    parser.add_argument("--steps", type=int, default=2000, help="of discriminator and generator each")
    parser.add_argument("--output", type=Path, default=Path("runs/catgan_toy"), help="folder of the picture")
    options = parser.parse_args()
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output {options.output}: {error.strerror}")
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)  # of networks this small
    points, moon = two_moons(POINTS)
    figure = Figure(figsize=(15, 3.7), layout="compressed")
    for axis, (title, weights) in zip(figure.subplots(1, len(VARIANTS)), VARIANTS.items()):
        draw(axis, points, moon, *train(points, weights, options.steps, options.seed), title)
    figure.savefig(options.output / "ablation.png", dpi=100)
    print(f"picture in {options.output / 'ablation.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(until_pipe_closes(main))
