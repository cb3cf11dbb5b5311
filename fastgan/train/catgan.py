"""Training of the CatGAN: unsupervised, semi-supervised and supervised."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from fastgan.data import Batch, ImageDataset, load_dataset, normalize
from fastgan.losses import (
    _fake_categories_loss, _real_categories_loss, catgan_generator_loss, feature_matching_loss,
)
from fastgan.metrics.clustering import (
    count_categories, evaluate, hungarian_map, majority_map, predict, recalibrate_batch_norm,
)
from fastgan.models.catgan import ARCHITECTURES, catgan
from fastgan.train.catgan_pictures import save_categories, save_confusion
from fastgan.train.config import LinearDecay, TrainConfig, option
from fastgan.train.distributed import Ranks
from fastgan.train.trainer import Objective, Trainer

GENERATOR_LOSSES = ("catgan", "feature-matching")
# Training images whose labels fit the map from categories to classes, and those that batch norm is measured on
# before an evaluation.
MAP_IMAGES, BATCH_NORM_IMAGES = 10_000, 5_000


@dataclasses.dataclass(kw_only=True)
class CatGANConfig(LinearDecay, TrainConfig):
    """Train a CatGAN (Springenberg 2015): a classifier from few labels, or none."""

    family: ClassVar[str] = "catgan"

    labels: str = option("100", "how many training images are labeled in all (equally many per class), 'all', or 0")
    categories: int | None = option(None, "outputs of the classifier; default: one per class, 20 without labels",
                                    minimum=1)
    supervised_weight: float = option(1.0, "weight of the cross-entropy against the entropies", minimum=0)
    marginal_weight: float = option(1.0, "weight of the real images' marginal entropy at the start; it reaches 1 "
                                    "linearly by the middle of --epochs", minimum=0)
    architecture: str = option("conv", "mlp: multilayer perceptron; conv: convolutions", choices=ARCHITECTURES)
    generator_loss: str = option("catgan", "loss of the generator", choices=GENERATOR_LOSSES)
    joint_batch_norm: bool | None = option(None, "real and generated images are one batch to the classifier's batch norm, which "
                                           "then sees how they differ, and the generator learns against running statistics; "
                                           "default: with --architecture mlp")
    base_channels: int = option(16, "channels of the convolutions next to the image", minimum=1)
    input_noise: float | None = option(None, "standard deviation of the noise on the images; by default the model's",
                                       minimum=0)
    hidden_noise: float | None = option(None, "standard deviation of the noise on hidden layers; by default the "
                                        "model's", minimum=0)
    augment: bool = option(True, "randomly shift, rotate and scale the real images a little")
    views: int = option(2, "random versions of each real image; the entropies are those of their mean prediction", minimum=1)
    labeled_batch: int = option(50, "labeled images per batch, in addition to --batch-size", minimum=1)
    validation: int = option(0, "training images to hold out; the error is then measured on them and the test set is "
                             "not read", minimum=0)
    decay: float = option(0.5, "final fraction (0 to 1) of the run over which the learning rate falls linearly to 0", minimum=0)
    image_size: int = option(28, "height and width of the images in pixels", minimum=1)
    epochs: int = option(10, "passes over the training images", minimum=1, may_change=True)
    batch_size: int = option(100, "images in a batch", minimum=2)
    learning_rate: float = option(1e-3, "Adam's learning rate for both networks", minimum=0)
    ema: float = option(0.999, "decay of the averaged weights used for tests and sampling; 0 turns averaging off",
                        minimum=0, below=1)
    output: str = option("runs/catgan", "folder the results are written to", may_change=True)

    def __post_init__(self):
        super().__post_init__()
        if self.labels != "all" and not self.labels.isdecimal():
            raise ValueError(f"--labels must be 'all' or a number of images, got {self.labels!r}")
        self.labels = self.labels if self.labels == "all" else str(int(self.labels))  # 00 is 0

    def load_data(self) -> ImageDataset:
        dataset = super().load_data()
        return _split(dataset, self.validation)[0] if self.validation else dataset

    def build(self, dataset: ImageDataset) -> tuple[nn.Module, nn.Module, Objective]:
        labels = dataset.labels
        if labels is None and self.labels != "0":
            raise ValueError(f"--labels {self.labels}: the data set {dataset.name!r} has no labels; use --labels 0")
        classes = 0 if labels is None else int(labels.max()) + 1
        categories = self.categories or (20 if self.labels == "0" else classes)
        if self.labels != "0" and categories < classes:
            raise ValueError(
                f"--categories must be at least the number of classes with labels, {classes}, got {categories}"
            )
        channels, size, _ = self.image_shape_of(dataset)
        generator, classifier = catgan(
            size, channels, categories, self.latent_dim, self.architecture,
            base_channels=self.base_channels, input_noise=self.input_noise, hidden_noise=self.hidden_noise,
        )  # fmt: skip
        return generator, classifier, CatGANObjective(self, dataset, classes, categories)

    def build_generator(self) -> nn.Module:
        channels, size, _ = self.image_shape
        return catgan(size, channels, 1, self.latent_dim, self.architecture, base_channels=self.base_channels)[0]


class CatGANObjective(Objective):
    """The CatGAN's losses over real, labeled and generated images, and its evaluation.

    ``d_real`` and ``d_fake`` among the figures are how certain the classifier is of the category: one minus the mean entropy, as
    a part of the largest one.
    """

    averaged = ("generator", "discriminator")
    no_graph = "the CatGAN's loss changes with the progress of the run, and its batches are put together on the host"

    def __init__(self, config: CatGANConfig, dataset: ImageDataset, classes: int, categories: int):
        super().__init__(config.generator_loss)
        self.config, self.dataset, self.classes, self.categories = config, dataset, classes, categories
        self.ranks = Ranks()
        count = len(dataset) if config.labels == "all" else int(config.labels)
        self.all_labeled = count > 0 and count == len(dataset)
        self.joint = config.architecture == "mlp" if config.joint_batch_norm is None else config.joint_batch_norm
        self.norms: list[_BatchNorm] | None = None  # the discriminator's
        if config.marginal_weight != 1:
            self.no_recording = "the weight of the marginal entropy changes with the progress of the run"
        self.labeled = None
        if count and not self.all_labeled:
            if config.labeled_batch % self.ranks.size:
                raise ValueError(
                    f"--labeled-batch must be divisible by the number of processes, {self.ranks.size}, "
                    f"got {config.labeled_batch}"
                )
            chosen = choose_labeled(dataset.labels, count, config.seed)
            device = config.torch_device
            self.labeled = Batch(dataset.images[chosen].to(device), dataset.labels[chosen].to(device))
        self.judged = None if dataset.labels is None else self._load_judged()

    def discriminator_losses(
        self, discriminator: nn.Module, batch: Batch, fake: Tensor
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        views = self.config.views
        images = [self._noisy(batch.images) for _ in range(views)]
        labels = batch.labels.repeat(views) if self.all_labeled else None
        if self.labeled is not None:
            count = self.config.labeled_batch // self.ranks.size
            chosen = torch.randint(len(self.labeled.images), (count,), device=fake.device)
            images.append(self._noisy(normalize(self.labeled.images[chosen])))
            labels = self.labeled.labels[chosen]
        fake_logits = None
        if self.joint:
            together = discriminator(torch.cat([*images, fake])).float()
            logits, fake_logits = together.split([len(together) - len(fake), len(fake)])
        else:
            logits = discriminator(torch.cat(images)).float()
        real = logits[: views * len(batch.images)]
        labeled_logits = None if labels is None else real if self.all_labeled else logits[len(real) :]
        mixed = mix_views(real, views)
        marginal_weight = self.config.marginal_weight
        if marginal_weight != 1:  # a step that reads the progress is not recorded
            marginal_weight = 1 + (marginal_weight - 1) * max(0.0, 1 - 2 * self.progress)
        loss, figures = _real_categories_loss(
            mixed, labeled_logits, labels, self.config.supervised_weight, marginal_weight, self.ranks.group
        )
        figures["d_real"] = self._certainty(figures["entropy_real"])
        if fake_logits is None:
            yield loss, figures
            loss, figures = 0.0, {}  # the running statistics are the real images'
            with _running_statistics_kept(self._norms(discriminator)):
                fake_logits = discriminator(fake)
        fake_loss = _fake_categories_loss(fake_logits)
        yield loss + fake_loss, figures | {"entropy_fake": -fake_loss.detach(), "d_fake": self._certainty(-fake_loss)}

    def generator_loss(self, discriminator: nn.Module, batch: Batch, fake: Tensor) -> tuple[Tensor, dict]:
        # By running statistics in place of the joint batch's; and for features, whose means over a batch that is normalised by its own
        # are the same whatever the images.
        running = self.joint or self.kind == "feature-matching"
        with _in_eval_mode(self._norms(discriminator) if running else []):
            if self.kind == "catgan":
                return catgan_generator_loss(discriminator(fake), process_group=self.ranks.group), {}
            with torch.no_grad():
                real = discriminator.features(self._noisy(batch.images))
            return feature_matching_loss(real, discriminator.features(fake), process_group=self.ranks.group), {}

    def evaluate(self, trainer: Trainer) -> dict[str, float]:
        """Errors in percent on the test set, or on the held-out images; pictures beside the metrics."""
        if self.judged is None:
            return {}
        classifier = trainer.averaged.get("discriminator", trainer.networks["discriminator"])
        with trainer.autocast():
            recalibrate_batch_norm(classifier, self.dataset.images[:BATCH_NORM_IMAGES])
            categories = predict(classifier, self.judged.images)
            if self.config.labels != "0":
                result = evaluate(categories, self.judged.labels, self.classes)
                errors = {"test_error": result.error}
            else:
                images, labels = self.dataset.images[:MAP_IMAGES], self.dataset.labels[:MAP_IMAGES]
                counts = count_categories(predict(classifier, images), labels, self.categories, self.classes)
                majority, hungarian = majority_map(counts), hungarian_map(counts)
                result = evaluate(categories, self.judged.labels, self.classes, majority)
                errors = {
                    "test_error_majority": result.error,
                    "test_error_hungarian": evaluate(categories, self.judged.labels, self.classes, hungarian).error,
                }
                save_categories(trainer.output / "categories.png", counts, categories, self.judged.images)
        save_confusion(trainer.output / "confusion.png", result.confusion, result.error)
        return errors

    def _norms(self, discriminator: nn.Module) -> list[_BatchNorm]:
        if self.norms is None:  # looked for once: it takes as long as a layer
            self.norms = [m for m in discriminator.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        return self.norms

    def _certainty(self, entropy: Tensor) -> Tensor:
        """What stands for D(x) where D has categories: 0 where all are equally likely, 1 where one is certain."""
        return 1 - entropy.detach() / math.log(max(2, self.categories))

    def _noisy(self, images: Tensor) -> Tensor:
        return random_affine(images) if self.config.augment else images

    def _load_judged(self) -> ImageDataset:
        config = self.config
        if config.validation:
            return _split(TrainConfig.load_data(config), config.validation)[1]
        return load_dataset(
            config.dataset, config.data_root, image_size=config.image_size, channels=config.channels, split="test"
        )


def choose_labeled(labels: Tensor, count: int, seed: int) -> Tensor:
    """Indices of ``count`` labeled examples, equally many of each class (to one), drawn by ``seed``.

    Args:
        labels: classes of the training images, int64 [N].
        count: how many keep their label.
        seed: decides which.

    Returns:
        int64 [count].

    Raises:
        ValueError: count below the number of classes, or a class with too few examples.
    """
    classes = int(labels.max()) + 1
    if not classes <= count <= len(labels):
        raise ValueError(
            f"--labels must be 0 or between {classes}, one a class, and {len(labels)}, all there are, got {count}"
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label in range(classes):
        share = count // classes + (label < count % classes)
        members = (labels == label).nonzero()[:, 0]
        if share > len(members):
            raise ValueError(
                f"--labels {count}: {share} of class {label} are needed, the data set has {len(members)}; "
                "use fewer, or 'all'"
            )
        chosen.append(members[torch.randperm(len(members), generator=generator)[:share]])
    return torch.cat(chosen)


def mix_views(logits: Tensor, views: int) -> Tensor:
    """Logits [N, K] of the mean prediction over several noisy views of N images, from [views * N, K]."""
    if views == 1:
        return logits
    log_p = F.log_softmax(logits.float(), 1).unflatten(0, (views, -1))
    return log_p.logsumexp(0) - math.log(views)


def random_affine(images: Tensor) -> Tensor:
    """Turns by up to 10 degrees, sizes by up to 10% and shifts by up to 2 of 28 pixels, each image by its own.

    Args:
        images: float [N, C, H, W] in [-1, 1], where -1 is the background that is moved in.
    """
    count, device = len(images), images.device
    angle, size, x, y = (2 * torch.rand(4, count, device=device) - 1) * torch.tensor(
        [math.radians(10), 0.1, 4 / 28, 4 / 28], device=device
    )[:, None]
    scale = 1 + size
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    # What affine_grid computes by a batch of small matrix products, which take longer than the sampling.
    rows, columns = (_pixel_centres(size, device) for size in images.shape[2:])
    vertical = torch.stack([sine[:, None] * rows + x[:, None], cosine[:, None] * rows + y[:, None]], 2)  # [N, H, 2]
    horizontal = torch.stack([cosine[:, None] * columns, -sine[:, None] * columns], 2)  # [N, W, 2]
    grid = vertical[:, :, None] + horizontal[:, None]
    return F.grid_sample(images + 1, grid, align_corners=False) - 1


def _pixel_centres(count: int, device: torch.device) -> Tensor:
    """Positions of a row's pixels, from edge to edge of [-1, 1]."""
    return (2 * torch.arange(count, device=device) + 1) / count - 1


def _split(dataset: ImageDataset, held_out: int) -> tuple[ImageDataset, ImageDataset]:
    """Training and validation images; the choice is the same for every seed of a run."""
    if not held_out < len(dataset):
        raise ValueError(f"--validation must be below the number of training images, {len(dataset)}, got {held_out}")
    if dataset.labels is None:
        raise ValueError(f"--validation: the data set {dataset.name!r} has no labels")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    parts = order[held_out:], order[:held_out]
    return tuple(ImageDataset(dataset.name, dataset.images[part], dataset.labels[part]) for part in parts)


@contextlib.contextmanager
def _in_eval_mode(norms: list[_BatchNorm]) -> Iterator[None]:
    """Inside, these normalise by their running statistics, which stay as they are; gradients go through them."""
    try:
        for norm in norms:
            norm.eval()
        yield
    finally:
        for norm in norms:
            norm.train()


@contextlib.contextmanager
def _running_statistics_kept(norms: list[_BatchNorm]) -> Iterator[None]:
    """Inside, these in training mode leave their running statistics as they are."""
    try:
        for norm in norms:
            norm.track_running_stats = False
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
