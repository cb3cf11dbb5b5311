import json

import pytest
import torch
from PIL import Image

from fastgan.data import Batch, ClassBatches, DataError, ImageDataset, load_dataset
from fastgan.models import mlp_gan
from fastgan.train import GANConfig, Trainer, run
from fastgan.train.gan import GANObjective
from fastgan.train.trainer import Objective

pytestmark = pytest.mark.usefixtures("same_thread_count_after_the_test")


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


def test_class_batches_hold_the_classes_in_order(digits):
    batches = ClassBatches(digits, 5, seed=0, classes=(3, 7))
    seen = list(batches.epoch(0))
    assert len(seen) == len(batches) == min((digits.labels == k).sum().item() for k in (3, 7)) // 5
    assert all(batch.labels.tolist() == [3] * 5 + [7] * 5 for batch in seen)
    images = torch.cat([batch.images for batch in seen]).flatten(1)
    assert len(images.unique(dim=0)) == len(images)
    assert torch.equal(next(batches.epoch(0, 4)).images, seen[4].images)
    assert not torch.equal(next(batches.epoch(1)).images, seen[0].images)


def test_class_batches_name_what_is_missing(digits):
    with pytest.raises(DataError, match="no labels to choose classes by"):
        ClassBatches(ImageDataset("folder", digits.images, None), 5, 0, (1,))
    with pytest.raises(DataError, match="images of class 4, .* got 100000"):
        ClassBatches(digits, 100000, 0, (4,))


def test_ten_digits_at_once_write_their_grid_and_resume_bit_exactly(tmp_path):
    common = ["--device", "cpu", "--threads", "1", "--log-every", "2"]
    assert run(GANConfig, [*common, "--output", str(tmp_path / "a"), "--max-steps", "6"]) == 0
    assert run(GANConfig, [*common, "--output", str(tmp_path / "b"), "--max-steps", "4"]) == 0
    assert run(GANConfig, ["--resume", str(tmp_path / "b"), "--max-steps", "6"]) == 0
    states = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["networks"] for name in "ab"]
    for network in states[0]:
        assert all(torch.equal(states[0][network][name], states[1][network][name]) for name in states[0][network])
    # A row of sixteen for each digit.
    width, height = Image.open(tmp_path / "a" / "samples" / "epoch_0001.png").size
    assert width > 1.5 * height
    assert json.loads((tmp_path / "a" / "config.json").read_text())["family"] == "gan"


@pytest.mark.parametrize("settings", [
    dict(digit=2), dict(digit=2, output_activation="linear", discriminator_layers=4), dict(generator_loss="minimax"),
])
def test_every_variant_of_the_report_trains(tmp_path, digits, settings):
    trainer = Trainer(GANConfig(device="cpu", output=str(tmp_path), max_steps=3, threads=1, **settings), digits)
    trainer.train()
    assert trainer.step == 3


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("kind, smoothing", [("non_saturating", 0.1), ("hinge", 0.0)])
def test_one_pass_of_the_discriminator_gives_the_losses_and_gradients_of_two(copies, kind, smoothing):
    torch.manual_seed(0)
    _, discriminator = mlp_gan((1, 5, 5), copies=copies)
    batch, fake = Batch(torch.randn(4 * copies, 1, 5, 5), None), torch.randn(4 * copies, 1, 5, 5)
    found = []
    for objective in (GANObjective(copies, kind, label_smoothing=smoothing), Objective(kind, label_smoothing=smoothing)):
        discriminator.zero_grad()
        losses, figures = 0, {}
        for loss, some in objective.discriminator_losses(discriminator, batch, fake):
            loss.backward()
            losses, figures = losses + loss.detach(), figures | some
        found.append((losses, figures, [parameter.grad for parameter in discriminator.parameters()]))
    torch.testing.assert_close(*found)
