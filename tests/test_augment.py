import pytest
import torch

from fastgan.data import load_dataset
from fastgan.train import DCGANConfig, Trainer
from fastgan.train.augment import augment


@pytest.mark.parametrize("shape", [(6, 1, 8, 8), (5, 3, 16, 16), (2, 3, 5, 7), (0, 3, 8, 8)])
def test_shape_stays_and_each_image_changes_its_own_way(shape):
    images = torch.full(shape, 0.5)
    changed = augment(images)
    assert changed.shape == shape and changed.isfinite().all()
    if len(images) > 4:
        assert len(changed.flatten(1).unique(dim=0)) == len(images)


def test_gradient_reaches_the_generator():
    # A pixel's gradient is 1 where it is kept and 0 in the hole or beyond the border: the batch keeps most of it.
    images = torch.rand(64, 1, 16, 16, requires_grad=True)
    augment(images).sum().backward()
    assert 0.4 < images.grad.mean() < 1


def test_images_are_shifted_by_up_to_an_eighth():
    torch.manual_seed(0)
    columns = torch.linspace(-1, 1, 16).expand(200, 1, 16, 16)
    brightest = augment(columns).amax(2).argmax(-1).flatten()
    assert set(brightest.tolist()) >= {13, 14, 15}


def test_a_run_with_augmentation_shows_the_discriminator_changed_images(tmp_path):
    dataset = load_dataset("digits", image_size=8)
    trainer = Trainer(DCGANConfig(image_size=8, batch_size=8, base_channels=2, device="cpu", augment=True,
                                  output=str(tmp_path), max_steps=2), dataset)
    seen = []
    trainer.networks["discriminator"].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    batch = next(trainer.batches.epoch(0))
    trainer.train_step(batch)
    assert len(seen) == 3 and not torch.equal(seen[0], batch.images)
