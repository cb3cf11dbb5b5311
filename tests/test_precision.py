"""What stays float32 in a run with lower precision, and what of it is saved."""

import pytest
import torch

from fastgan.data import ImageDataset, load_dataset
from fastgan.losses import catgan_discriminator_loss, catgan_generator_loss, discriminator_loss, generator_loss
from fastgan.train import CatGANConfig, DCGANConfig, Trainer
from fastgan.train.checkpoint import load_checkpoint

SMALL = dict(dataset="digits", device="cpu", image_size=16, base_channels=4, latent_dim=4, batch_size=8, max_steps=2)


@pytest.fixture(scope="module")
def images():
    dataset = load_dataset("digits", image_size=16)
    return ImageDataset(dataset.name, dataset.images[:64], dataset.labels[:64])


@pytest.mark.parametrize("config_class", [DCGANConfig, CatGANConfig])
def test_losses_weights_statistics_and_optimizer_stay_float32_in_a_bfloat16_run(tmp_path, images, config_class):
    settings = SMALL | ({"labels": "all"} if config_class is CatGANConfig else {})
    trainer = Trainer(config_class(**settings, precision="bf16", output=str(tmp_path)), images)
    seen, inputs = [], []

    compute_d, compute_g = trainer.objective.discriminator_losses, trainer.objective.generator_loss

    def watched(loss, figures):
        seen.extend([loss, *figures.values()])
        return loss, figures

    trainer.objective.discriminator_losses = lambda *arguments: (watched(*term) for term in compute_d(*arguments))
    trainer.objective.generator_loss = lambda *arguments: watched(*compute_g(*arguments))
    discriminator = trainer.networks["discriminator"]
    forward = discriminator.forward
    discriminator.forward = lambda x: inputs.append(forward(x)) or inputs[-1]
    batch = next(iter(trainer.batches.epoch(0)))
    trainer.train_step(batch)
    # Otherwise the run was float32 all along.
    assert {logits.dtype for logits in inputs} == {torch.bfloat16}
    assert len(seen) > 4 and {value.dtype for value in seen} == {torch.float32}
    for network in trainer.networks.values():
        tensors = [*network.parameters(), *network.buffers()]
        tensors += [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
        assert {tensor.dtype for tensor in tensors} <= {torch.float32, torch.int64}
    for optimizer in trainer.optimizers.values():
        assert {value.dtype for state in optimizer.state.values() for value in state.values()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_of_low_precision_logits_are_those_of_the_same_values_in_float32(dtype):
    logits = torch.linspace(-30, 30, 4096).view(1024, 4).to(dtype)
    for loss in (
        lambda x: discriminator_loss(x, -x), generator_loss, catgan_generator_loss,
        lambda x: catgan_discriminator_loss(x, -x, x, torch.arange(1024) % 4),
    ):  # fmt: skip
        low, high = loss(logits), loss(logits.float())
        assert low.dtype == torch.float32
        torch.testing.assert_close(low, high, rtol=1e-5, atol=1e-6)


def test_the_state_of_the_gradient_scalers_is_saved_and_restored(tmp_path, images):
    # fp16 itself needs a GPU; its scalers run anywhere.
    config = DCGANConfig(**SMALL, output=str(tmp_path))
    trainer = Trainer(config, images)
    trainer.scalers = {name: torch.amp.GradScaler("cpu", init_scale=2.0**k) for k, name in enumerate(trainer.networks, 3)}
    batch = next(iter(trainer.batches.epoch(0)))
    trainer.train_step(batch)
    assert all(torch.isfinite(parameter).all() for parameter in trainer.networks["generator"].parameters())
    # An overflow halves the scale and leaves the weights alone.
    before = trainer.networks["discriminator"].state_dict()["main.0.weight"].clone()
    trainer.optimizers["discriminator"].zero_grad()
    loss = sum((parameter * float("inf")).sum() for parameter in trainer.networks["discriminator"].parameters())
    trainer.scalers["discriminator"].scale(loss).backward()
    trainer.scalers["discriminator"].step(trainer.optimizers["discriminator"])
    trainer.scalers["discriminator"].update()
    assert torch.equal(trainer.networks["discriminator"].state_dict()["main.0.weight"], before)
    trainer.save()
    saved = load_checkpoint(tmp_path / "checkpoint.pt", "dcgan")
    assert {name: state["scale"] for name, state in saved["scalers"].items()} == {"generator": 8.0, "discriminator": 8.0}
    trainer.scalers = {name: torch.amp.GradScaler("cpu") for name in trainer.networks}
    trainer._restore(saved)
    assert {name: scaler.get_scale() for name, scaler in trainer.scalers.items()} == {"generator": 8.0, "discriminator": 8.0}
