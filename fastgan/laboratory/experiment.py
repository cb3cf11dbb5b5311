"""Training of one-dimensional GANs, all seeds at once, and the experiments on their theory."""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgan._arguments import MOST_THREADS
from fastgan.laboratory.mixture import Mixture
from fastgan.laboratory.networks import Adam, StackedMLP
from fastgan.train.checkpoint import TrainingError
from fastgan.train.config import check_limits, option
from fastgan.train.outputs import Progress

GENERATOR_LOSSES = ("non_saturating", "minimax")
STEPS_PER_EPOCH = 200


@dataclasses.dataclass(kw_only=True)
class LaboratoryConfig:
    """Train GANs on a one-dimensional Gaussian, or a mixture, for many seeds at once.

    Raises:
        ValueError: a setting outside its limits.
    """

    family: ClassVar[str] = "gaussian"

    means: str = option("3", "mean of the data; several with commas between make a mixture")
    stds: str = option("0.5", "standard deviation of the data; as many as means")
    noise_range: float = option(8.0, "the generator's input is uniform from minus this to this", minimum=1e-6, below=1e6)
    seeds: int = option(10, "networks trained side by side, each with weights and samples of its own", minimum=1)
    epochs: int | None = option(None, "epochs of 200 steps each (the data are drawn anew, there is no set to pass "
                                "over); by default 20, or as many as --max-steps needs", minimum=1)
    max_steps: int | None = option(None, "stop after this many steps, counted from the start of the run", minimum=1,
                                   may_change=True)
    batch_size: int = option(120, "samples in a step", minimum=2)
    hidden_features: int = option(11, "units of every hidden layer", minimum=1)
    generator_learning_rate: float = option(5e-3, "Adam's learning rate for the generator; falls to 0 over the second half", minimum=0)
    discriminator_learning_rate: float = option(
        5e-3, "Adam's learning rate for the discriminator; falls to 0 over the second half", minimum=0)
    beta1: float = option(0.0, "Adam's decay of the mean gradient; momentum makes the two networks circle", minimum=0, below=1)
    beta2: float = option(0.9, "Adam's decay of the mean squared gradient", minimum=0, below=1)
    ema: float = option(0.998, "decay of the averaged generator that is shown; 0 for none", minimum=0, below=1)
    standardize: bool = option(True, "bring the data to mean 0 and deviation 1 for both networks, as images are "
                                     "brought to [-1, 1]; without, fewer seeds come close")
    generator_loss: str = option("non_saturating", "loss of the generator", choices=GENERATOR_LOSSES)
    seed: int = option(0, "seed of everything", minimum=0, below=2**32)
    device: str = option("cpu", "always the CPU (auto means the same): the networks are too small for a GPU", choices=("auto", "cpu"))
    precision: str = option("fp32", "arithmetic; only fp32 is available", choices=("fp32",))
    threads: int = option(1, "CPU threads; more than one only costs here", minimum=1, below=MOST_THREADS + 1, may_change=True)
    output: str = option("runs/gaussian", "folder the results are written to", may_change=True)
    resume: str | None = option(None, "folder of a run to continue, or its checkpoint.pt, with that run's settings", may_change=True)

    def __post_init__(self):
        check_limits(self)
        self.data  # raises for means and stds that do not fit
        # Settled here and saved: a resumed run with another --max-steps keeps its plan, and with it the fall of the step size.
        self.epochs = self.epochs or max(20, math.ceil((self.max_steps or 0) / STEPS_PER_EPOCH))

    @property
    def planned_steps(self) -> int:
        """Steps of all epochs, over which the step size falls to 0."""
        return self.epochs * STEPS_PER_EPOCH

    @property
    def total_steps(self) -> int:
        """Steps of the run: the planned ones, or ``max_steps`` where that is less."""
        return min(self.planned_steps, self.max_steps or self.planned_steps)

    @property
    def data(self) -> Mixture:
        """The distribution to learn."""
        try:
            means, stds = (tuple(map(float, text.split(","))) for text in (self.means, self.stds))
        except ValueError:
            raise ValueError(f"--means and --stds must be numbers with commas between, got {self.means} and {self.stds}")
        return Mixture(means, stds)


@dataclasses.dataclass
class Run:
    """A finished training.

    Attributes:
        generator, discriminator: the trained stacks; the generator's weights are the averaged ones.
        steps: of the frames, [T].
        samples: of the generators at every frame, float32 [T, seeds, 2000], from evenly spaced inputs.
        grid: places x of the curves, [X].
        curves: the discriminators' probabilities over the grid at every frame, [T, seeds, X].
        losses: ``loss_d``, ``loss_g``, ``d_real`` and ``d_fake`` (mean probabilities) at every frame, [T, seeds].
        images_per_second: samples of the data, of all seeds together, that the steps since the frame before took in; 0 for the
            first frame.
    """

    config: LaboratoryConfig
    generator: StackedMLP
    discriminator: StackedMLP
    steps: list[int]
    samples: Tensor
    grid: Tensor
    curves: Tensor
    losses: dict[str, Tensor]
    images_per_second: list[float]


def train(
    config: LaboratoryConfig, *, frames: int = 20, resumed: dict[str, Any] | None = None,
    save: Callable[[dict[str, Any]], None] = lambda state: None, stop: Callable[[], Any] = lambda: False,
    progress: Progress | None = None,
) -> Run:
    """Train all seeds (Goodfellow et al. 2014, algorithm 1).

    Args:
        config: the settings.
        frames: looks at the networks, evenly over the planned steps, beside those at the end of every epoch and of the run.
        resumed: what ``save`` was given; the run goes on from there, bit for bit as if it had not stopped.
        save: called with the state of the run, tensors and numbers in dictionaries, at step 0, after every epoch and at the end.
        stop: asked before every step whether the run is to end there.
        progress: what shows the steps, and the median over the seeds of the losses and mean probabilities at every look.

    Returns:
        The trained networks and what was seen of them.

    Raises:
        ValueError: ``config.max_steps`` below the step of ``resumed``.
        TrainingError: weights or outputs that are not finite; what was saved last is from before them.
    """
    random = torch.Generator().manual_seed(config.seed)
    data, count, seeds, total = config.data, config.batch_size, config.seeds, config.total_steps
    shift, scale = _standardisation(config)
    generator, discriminator = _networks(config, random)
    optimizer_g = Adam(generator.parameters, config.beta1, config.beta2)
    optimizer_d = Adam(discriminator.parameters, config.beta1, config.beta2)
    averaged = generator.parameters.clone()
    real_then_fake = torch.cat([torch.ones(count), torch.zeros(count)])
    z = torch.empty(seeds, 1, count)
    grid = torch.linspace(*data.limits(5), 401)
    recorded = ("steps", "images_per_second", "samples", "curves", "loss_d", "loss_g", "d_real", "d_fake")
    history: dict[str, list] = {name: [] for name in recorded}
    weights = {"generator": generator.parameters, "discriminator": discriminator.parameters, "averaged": averaged,
               "mean_g": optimizer_g.mean, "square_g": optimizer_g.square,
               "mean_d": optimizer_d.mean, "square_d": optimizer_d.square}
    first, speed = 0, 0.0
    if resumed:
        if total < resumed["step"]:
            raise ValueError(f"--max-steps must be at least {resumed['step']}, the step of the checkpoint, got {total}")
        for name, value in weights.items():
            value.copy_(resumed["weights"][name])
        random.set_state(resumed["random"])
        first = optimizer_g.steps = optimizer_d.steps = resumed["step"]
        speed = resumed["history"]["images_per_second"][-1]
        # The last look was at the end of the run that stopped; it is taken anew.
        history = {name: values[:-1] for name, values in resumed["history"].items()}

    frame_steps = {round(number * config.planned_steps / frames) for number in range(frames + 1)}
    frame_steps |= {*range(0, total, STEPS_PER_EPOCH), total}
    looked, started = first, time.perf_counter()  # the step of the last look, and the time of its end
    for step in range(first, total + 1):
        ends = step == total or bool(stop())
        looks = ends or step in frame_steps
        if looks:
            if step > looked:
                speed = round(count * seeds * (step - looked) / (time.perf_counter() - started), 1)
            history["steps"].append(step)
            history["images_per_second"].append(speed)
            history["samples"].append(_generate(generator, averaged, config.noise_range) * scale + shift)
            history["curves"].append(
                discriminator.forward(((grid - shift) / scale).expand(seeds, 1, -1)).sigmoid()[:, 0]
            )
        before = random.get_state() if looks else None
        x = (data.sample((seeds, 1, count), random) - shift) / scale
        fake = generator.forward(z.uniform_(-config.noise_range, config.noise_range, generator=random))
        logits = discriminator.forward(torch.cat([x, fake], 2))
        # A sum takes a seventh of the time of isfinite().all(), and is not finite where a part is not.
        if not math.isfinite(float(logits.sum() + generator.parameters.sum() + discriminator.parameters.sum())):
            _check_finite(step, generator, fake, discriminator, logits)
        probabilities = logits.sigmoid()
        if looks:
            _note_losses(history, config, logits)
            if ends or step == 0 or step > first and step % STEPS_PER_EPOCH == 0:
                save({"step": step, "weights": weights, "random": before, "history": history})
            if progress and step > first:
                progress.show({"step": step} | median_figures(history, -1), always=ends or step % STEPS_PER_EPOCH == 0)
            if ends:
                break
            looked, started = step, time.perf_counter()

        # Full speed for half of the run, then down to 0, so that the circling dies out.
        rate = min(1.0, 2 * (1 - step / config.planned_steps))
        # The gradient of -log D(x) - log(1 - D(G(z))) for the logit is D(x) - 1 on data and D(G(z)) on fakes.
        discriminator.backward((probabilities - real_then_fake) / count)
        optimizer_d.step(discriminator.gradients, config.discriminator_learning_rate * rate)

        gradient = generator_loss_gradient(discriminator.forward(fake), config.generator_loss) / count
        generator.backward(discriminator.backward(gradient, weights=False, input=True))
        optimizer_g.step(generator.gradients, config.generator_learning_rate * rate)
        averaged.lerp_(generator.parameters, 1 - min(config.ema, (1 + step) / (10 + step)) if config.ema else 1.0)
        if progress:
            progress.advance()
    generator.parameters.copy_(averaged)
    steps, speeds = history.pop("steps"), history.pop("images_per_second")
    found = {name: torch.stack(values) for name, values in history.items()}
    return Run(config, generator, discriminator, steps, found.pop("samples"), grid, found.pop("curves"), found, speeds)


def _check_finite(step: int, generator: StackedMLP, fake: Tensor, discriminator: StackedMLP, logits: Tensor) -> None:
    """Raises TrainingError for weights after ``step``, or outputs of the next one, that are not finite. Finite ones pass: their sum
    may overflow.
    """
    for name, network, output in (("generator", generator, fake), ("discriminator", discriminator, logits)):
        if found := network.first_nonfinite(output):
            layer, kind, copies = found
            others = f", the first of {len(copies)} such networks" if len(copies) > 1 else ""
            raise TrainingError(
                f"step {step if kind != 'output' else step + 1}: not finite: {name} {copies[0] + 1} of {network.copies}, layer {layer} "
                f"({kind}){others}. What was saved last is from before it; a lower learning rate often helps"
            )


def median_figures(history: dict[str, list], number: int) -> dict[str, float]:
    """Losses and mean probabilities at one look: the medians over the seeds."""
    return {name: float(history[name][number].median()) for name in ("loss_d", "loss_g", "d_real", "d_fake")}


def _note_losses(history: dict[str, list], config: LaboratoryConfig, logits: Tensor) -> None:
    """Losses and mean probabilities of every seed, from the discriminators' logits of data and fakes."""
    real, fake = logits.chunk(2, 2)
    history["loss_d"].append((F.softplus(-real) + F.softplus(fake)).mean((1, 2)))
    loss = F.softplus(-fake) if config.generator_loss == "non_saturating" else -F.softplus(fake)
    history["loss_g"].append(loss.mean((1, 2)))
    history["d_real"].append(real.sigmoid().mean((1, 2)))
    history["d_fake"].append(fake.sigmoid().mean((1, 2)))


def generator_loss_gradient(logits: Tensor, kind: str) -> Tensor:
    """Gradient of the generator's loss of each sample for the discriminator's logit of it.

    ``-log D`` (non-saturating) gives D - 1, ``log(1 - D)`` (minimax) gives -D, which vanishes where D is sure.
    """
    probabilities = logits.sigmoid()
    return probabilities - 1 if kind == "non_saturating" else -probabilities


def fit_discriminator(config: LaboratoryConfig, generators: Mixture, *, steps: int = 1000) -> tuple[Tensor, Tensor, Tensor]:
    """Train discriminators to their optimum against a generator that stays as it is.

    Args:
        config: the settings.
        generators: the distribution of the fixed generator.
        steps: of the discriminators' training.

    Returns:
        Places x [X] where data or generator are at least 1% as dense as at their densest, the discriminators' probabilities
        there [seeds, X], and the optimal ones ``p_d / (p_d + p_g)`` [X] (Goodfellow et al. 2014, proposition 1).
    """
    random = torch.Generator().manual_seed(config.seed)
    shift, scale = _standardisation(config)
    count = 2 * config.batch_size
    _, discriminator = _networks(config, random)
    optimizer = Adam(discriminator.parameters, 0.9, 0.999)
    real_then_fake = torch.cat([torch.ones(count), torch.zeros(count)])
    for step in range(steps):
        shape = (config.seeds, 1, count)
        x = (torch.cat([config.data.sample(shape, random), generators.sample(shape, random)], 2) - shift) / scale
        discriminator.backward((discriminator.forward(x).sigmoid() - real_then_fake) / count)
        optimizer.step(discriminator.gradients, 1e-2 * (1 - step / steps))
    limits = list(zip(config.data.limits(5), generators.limits(5)))
    x = torch.linspace(min(limits[0]), max(limits[1]), 1001)
    real, fake = config.data.density(x), generators.density(x)
    inside = (real + fake) >= 0.01 * (real + fake).max()
    x = x[inside]
    found = discriminator.forward(((x - shift) / scale).expand(config.seeds, 1, -1)).sigmoid()[:, 0]
    return x, found, (real / (real + fake))[inside]


def gradient_norms(config: LaboratoryConfig, *, steps: int = 200) -> dict[str, Tensor]:
    """Norm of the generator's gradient under both losses while the discriminator runs ahead, early in training.

    The generators stay at their first weights and the discriminators learn, as they do in the first steps of a run
    when the samples are easy to tell apart; both losses are taken at the same weights.

    Args:
        config: the settings.
        steps: of the discriminators' training.

    Returns:
        Loss name to [steps, seeds].
    """
    random = torch.Generator().manual_seed(config.seed)
    shift, scale = _standardisation(config)
    count = config.batch_size
    generator, discriminator = _networks(config, random)
    optimizer = Adam(discriminator.parameters, config.beta1, config.beta2)
    real_then_fake = torch.cat([torch.ones(count), torch.zeros(count)])
    norms: dict[str, list[Tensor]] = {kind: [] for kind in GENERATOR_LOSSES}
    for _ in range(steps):
        x = (config.data.sample((config.seeds, 1, count), random) - shift) / scale
        z = torch.empty(config.seeds, 1, count).uniform_(-config.noise_range, config.noise_range, generator=random)
        fake = generator.forward(z)
        discriminator.backward((discriminator.forward(torch.cat([x, fake], 2)).sigmoid() - real_then_fake) / count)
        optimizer.step(discriminator.gradients, config.discriminator_learning_rate)
        logits = discriminator.forward(fake)
        for kind in GENERATOR_LOSSES:
            gradient = generator_loss_gradient(logits, kind) / count
            generator.backward(discriminator.backward(gradient, weights=False, input=True))
            norms[kind].append(generator.gradient_norms())
    return {kind: torch.stack(values) for kind, values in norms.items()}


def _networks(config: LaboratoryConfig, random: torch.Generator) -> tuple[StackedMLP, StackedMLP]:
    """The report's shapes: a generator of two layers, a discriminator of three."""
    hidden = config.hidden_features
    generator = StackedMLP([1, hidden, 1], config.seeds, config.noise_range, random)
    return generator, StackedMLP([1, hidden, hidden, 1], config.seeds, 1.0, random)


def _standardisation(config: LaboratoryConfig) -> tuple[float, float]:
    """Shift and scale of the data, from 10,000 samples of it."""
    if not config.standardize:
        return 0.0, 1.0
    sample = config.data.sample((10_000,), torch.Generator().manual_seed(config.seed))
    return float(sample.mean()), float(sample.std())


def load_generator(state: dict[str, Any]) -> tuple[LaboratoryConfig, StackedMLP]:
    """The settings and the trained generators, by their averaged weights, of a laboratory's checkpoint."""
    config = LaboratoryConfig(**state["config"])
    generator, _ = _networks(config, torch.Generator().manual_seed(config.seed))
    generator.parameters.copy_(state["weights"]["averaged"])
    return config, generator


def generate(config: LaboratoryConfig, generator: StackedMLP, z: Tensor) -> Tensor:
    """Samples [seeds, N] in the data's own units from inputs z [seeds, N] within the noise range."""
    shift, scale = _standardisation(config)
    return generator.forward(z[:, None])[:, 0] * scale + shift


def _generate(generator: StackedMLP, weights: Tensor, noise_range: float) -> Tensor:
    """Samples [seeds, 2000] under other weights, from inputs that fill the noise range evenly."""
    kept = generator.parameters.clone()
    generator.parameters.copy_(weights)
    z = torch.linspace(-noise_range, noise_range, 2000).expand(generator.copies, 1, -1)
    samples = generator.forward(z)[:, 0]
    generator.parameters.copy_(kept)
    return samples
