"""Gradient penalties, label smoothing, spectral norm and two time scales: values, gradients through fused networks,
and training runs."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils.parametrize import is_parametrized

import fastgan
from fastgan import ops
from fastgan.data import ImageDataset
from fastgan.losses import discriminator_loss, generator_loss, gradient_penalty, r1_penalty
from fastgan.models import dcgan
from fastgan.train import DCGANConfig, GANConfig, Trainer


def linear(slope):
    """D(x) = slope . x, whose gradient is slope everywhere."""
    return lambda x: x.flatten(1) @ slope


def test_penalties_of_a_linear_discriminator_by_hand():
    slope = torch.tensor([3.0, 4.0, 0.0], dtype=torch.float64)
    real, fake = torch.randn(2, 5, 3, dtype=torch.float64)
    assert gradient_penalty(linear(slope), real, fake).item() == pytest.approx(10 * (5 - 1) ** 2)
    assert gradient_penalty(linear(slope), real, fake, target=0.0, weight=2.0).item() == pytest.approx(2 * 25)
    assert r1_penalty(linear(slope), real).item() == pytest.approx(10 / 2 * 25)
    assert r1_penalty(linear(slope), real, weight=1.0).item() == pytest.approx(12.5)


def test_penalties_take_samples_that_are_numbers():
    real, fake = torch.randn(2, 5, dtype=torch.float64)
    assert gradient_penalty(lambda x: 3 * x, real, fake).item() == pytest.approx(10 * (3 - 1) ** 2)
    assert r1_penalty(lambda x: 3 * x, real).item() == pytest.approx(10 / 2 * 9)


def test_gradient_penalty_looks_between_each_real_and_its_generated_sample():
    seen = []

    def discriminator(x):
        seen.append(x.detach())
        return x.square().sum((1, 2))

    real = torch.arange(6.0).reshape(6, 1, 1).expand(6, 2, 2).contiguous()
    fake = real + 10
    gradient_penalty(discriminator, real, fake)
    share = (seen[0] - real) / 10
    assert ((share >= 0) & (share <= 1)).all() and share[:, 0, 0].unique().numel() == 6
    torch.testing.assert_close(share, share[:, :1, :1].expand_as(share))  # the same for all of a sample
    assert not real.requires_grad and not fake.requires_grad


def test_a_flat_discriminator_gives_finite_gradients():
    discriminator = nn.Linear(3, 1)
    nn.init.zeros_(discriminator.weight)
    gradient_penalty(discriminator, torch.randn(4, 3), torch.randn(4, 3)).backward()
    assert discriminator.weight.grad.isfinite().all()


# The stack operator takes float32 with widths of 16; float64 takes the single operators.
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-3)])
@pytest.mark.parametrize("normalization", ["batch", "layer", "none"])
def test_penalties_and_their_gradients_through_fuse_equal_plain_pytorch(normalization, dtype, tolerance):
    torch.manual_seed(0)
    _, plain = dcgan(16, 3, base_channels=16, discriminator_normalization=normalization)
    plain = plain.to(dtype)
    for parameter in plain.parameters():  # away from the tiny initial weights
        if parameter.dim() == 4:
            parameter.data.mul_(5)
    fused = fastgan.fuse(copy.deepcopy(plain))
    real, fake = torch.randn(2, 6, 3, 16, 16, dtype=dtype)
    results = []
    for network in (plain, fused):
        torch.manual_seed(1)
        penalty = gradient_penalty(network, real, fake, weight=2.0) + r1_penalty(network, real)
        gradients = torch.autograd.grad(penalty, list(network.parameters()), allow_unused=True)
        results.append([penalty, *[g for g in gradients if g is not None]])
    assert len(results[0]) == len(results[1]) > 3 and results[0][0] > 0
    scale = max(g.abs().max().item() for g in results[0])
    for theirs, ours in zip(*results):
        assert theirs.dtype == ours.dtype == dtype
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * 1e-2 * scale)


WEIGHT, ROWS = torch.randn(8, 8, 4, 4, dtype=torch.float64) / 8, torch.randn(8, dtype=torch.float64)
DEPENDENT = {  # functions of images [2, 8, 8, 8] and of a weight, whose layers share what they are computed from
    "one weight twice": lambda x, w: ops.conv2d_act(ops.conv2d_act(x, w, padding="same", activation="tanh"), w, stride=2, padding=1),
    "with batch norm": lambda x, w: ops.conv2d_bn_act(ops.conv2d_bn_act(x, w, padding=2, activation="tanh"), w, stride=2, padding=1),
    "transposed": lambda x, w: ops.conv_transpose2d_act(ops.conv_transpose2d_act(x, w, activation="tanh"), w, activation="sigmoid"),
    "a weight of the images": lambda x, w: ops.conv2d_act(x, w * x.mean(), stride=2, padding=1, activation="tanh"),
    "scale and shift in one": lambda x, w: ops.batch_norm_act_noise(x, w[0, :, 0, 0], w[0, :, 0, 0], activation="tanh"),
}


@pytest.mark.filterwarnings("ignore:fastgan runs .* in plain PyTorch:RuntimeWarning")
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("name", DEPENDENT)
def test_derivatives_where_inputs_depend_on_each_other(name, create_graph):
    function = DEPENDENT[name]
    x = torch.randn(2, 8, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = WEIGHT.clone().requires_grad_()
    found = torch.autograd.grad(function(x, weight).square().sum(), (x, weight), create_graph=create_graph)
    with forward_ad.dual_level():  # where PyTorch's own operators run
        expected = torch.autograd.grad(function(x, weight).square().sum(), (x, weight), create_graph=create_graph)
    torch.testing.assert_close(found, expected)
    if create_graph:
        second = [torch.autograd.grad(sum(g.sin().sum() for g in gradients), (x, weight)) for gradients in (found, expected)]
        torch.testing.assert_close(*second)


@pytest.mark.parametrize("layers", [
    lambda conv, linear: [conv, nn.Tanh(), conv, nn.Tanh()],
    lambda conv, linear: [nn.Flatten(), linear, nn.Tanh(), linear, nn.BatchNorm1d(256), nn.Tanh()],
], ids=["convolution", "linear"])  # fmt: skip
@pytest.mark.parametrize("repeats", [1, 2])
def test_derivatives_of_a_fused_network_that_shares_weights(layers, repeats):
    torch.manual_seed(0)
    plain = nn.Sequential(*layers(nn.Conv2d(16, 16, 4, 2, 1), nn.Linear(256, 256)))
    x = torch.randn(6, 16, 4**repeats, 4**repeats) if isinstance(plain[0], nn.Conv2d) else torch.randn(6, 256)
    gradients = []
    for network in (plain, fastgan.fuse(copy.deepcopy(plain))):
        loss = (network(x) if repeats == 1 else network(network(x)).square()).sum()
        gradients.append(torch.autograd.grad(loss, list(network.parameters()), create_graph=True))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_a_hook_sees_a_gradient_once_whether_or_not_it_is_differentiated():
    for create_graph in (False, True):
        network = fastgan.fuse(nn.Sequential(nn.Conv2d(16, 16, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(16, 16, 4, 2, 1)))
        seen = []
        network[0].weight.register_hook(lambda gradient: seen.append(gradient))  # noqa: B023
        torch.autograd.grad(network(torch.randn(2, 16, 16, 16)).sum(), network[0].weight, create_graph=create_graph)
        assert len(seen) == 1


def test_penalties_are_computed_in_float32_under_autocast():
    torch.manual_seed(0)
    _, network = dcgan(8, 1, base_channels=4, discriminator_normalization="none")
    real, fake = torch.randn(2, 4, 1, 8, 8)
    torch.manual_seed(1)
    expected = gradient_penalty(network, real, fake), r1_penalty(network, real)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        penalties = gradient_penalty(network, real, fake), r1_penalty(network, real)
    assert penalties == expected


def test_wrong_penalty_arguments_are_refused_by_name():
    real = torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"gradient_penalty: fake must have the shape of real, \[4, 3\], got \[2, 3\]"):
        gradient_penalty(nn.Linear(3, 1), real, real[:2])
    with pytest.raises(ValueError, match="gradient_penalty: weight must be at least 0, got -1"):
        gradient_penalty(nn.Linear(3, 1), real, real, weight=-1)
    with pytest.raises(ValueError, match="r1_penalty: real must be a floating-point tensor, got torch.int64"):
        r1_penalty(nn.Linear(3, 1), real.long())


def test_label_smoothing_equals_cross_entropy_with_a_label_below_1():
    real, fake = torch.randn(2, 7, dtype=torch.float64)
    bce = nn.functional.binary_cross_entropy_with_logits
    expected = bce(real, torch.full_like(real, 0.9)) + bce(fake, torch.zeros_like(fake))
    torch.testing.assert_close(discriminator_loss(real, fake, label_smoothing=0.1), expected)
    assert discriminator_loss(real, fake, label_smoothing=0.0) == discriminator_loss(real, fake)


def test_label_smoothing_is_refused_where_it_means_nothing():
    with pytest.raises(ValueError, match="label_smoothing must be 0 with kind 'hinge'.*got 0.1"):
        discriminator_loss(torch.zeros(3), torch.zeros(3), "hinge", label_smoothing=0.1)
    with pytest.raises(ValueError, match="label_smoothing must be at least 0 and below 1, got 1"):
        discriminator_loss(torch.zeros(3), torch.zeros(3), label_smoothing=1)
    with pytest.raises(ValueError, match="--label-smoothing must be 0 with --generator-loss wasserstein"):
        DCGANConfig(label_smoothing=0.1, generator_loss="wasserstein")


def test_wgan_gp_learns_a_gaussian_and_its_critic_has_slope_1():
    torch.manual_seed(0)
    mean, std = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 1.0])
    generator = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 2))
    critic = nn.Sequential(nn.Linear(2, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))
    optimizers = [torch.optim.Adam(n.parameters(), 2e-3, betas=(0.5, 0.9)) for n in (critic, generator)]
    for _ in range(300):
        for _ in range(3):
            real, fake = mean + std * torch.randn(128, 2), generator(torch.randn(128, 2)).detach()
            loss = discriminator_loss(critic(real), critic(fake), "wasserstein")
            optimizers[0].zero_grad()
            (loss + gradient_penalty(critic, real, fake)).backward()
            optimizers[0].step()
        optimizers[1].zero_grad()
        generator_loss(critic(generator(torch.randn(128, 2))), "wasserstein").backward()
        optimizers[1].step()
    samples = generator(torch.randn(4000, 2)).detach()
    assert (samples.mean(0) - mean).abs().max() < 0.7  # 2 at the start
    assert ((samples.std(0) / std).log().abs() < 0.7).all()
    x = (mean + std * torch.randn(500, 2)).requires_grad_()
    (slope,) = torch.autograd.grad(critic(x).sum(), x)
    assert slope.norm(dim=1).mean().item() == pytest.approx(1, abs=0.5)


# --- trainer


def trainer(folder, **settings):
    images = torch.randint(0, 256, (80, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    config = DCGANConfig(image_size=8, channels=1, batch_size=8, base_channels=4, latent_dim=5, device="cpu",
                         max_steps=4, log_every=1, output=str(folder), **{"ema": 0, **settings})
    return Trainer(config, ImageDataset("noise", images, None))


@pytest.mark.parametrize("settings", [
    dict(generator_loss="wasserstein", gradient_penalty=10.0, discriminator_steps=2),
    dict(r1=5.0), dict(r1=5.0, precision="bf16"), dict(label_smoothing=0.1), dict(generator_loss="minimax"),
    dict(generator_loss="least_squares", discriminator_normalization="layer"),
    dict(generator_loss="hinge", spectral_norm=True, discriminator_learning_rate=1e-3),
    dict(spectral_norm=True, ema=0.9),
], ids=str)  # fmt: skip
def test_a_short_run_of_every_kind_changes_both_networks_and_logs_its_terms(tmp_path, settings):
    run = trainer(tmp_path, **settings)
    before = copy.deepcopy({name: list(network.parameters()) for name, network in run.networks.items()})
    run.train()
    for name, network in run.networks.items():
        for old, new in zip(before[name], network.parameters(), strict=True):
            assert old.dim() == 1 or not torch.equal(old, new), name  # hinge has no gradient for the last bias at first
    record = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["step"] == 4
    for name, flag in (("gradient_penalty", "gradient_penalty"), ("r1", "r1")):
        assert (name in record) == (flag in settings)
        assert record.get(name, 1.0) > 0


def test_steps_of_the_discriminator_take_images_of_their_own(tmp_path):
    run = trainer(tmp_path, discriminator_steps=2)
    assert run.total_steps == 4 and len(run.batches) == 80 // 16
    seen = []
    losses = run.objective.discriminator_losses
    run.objective.discriminator_losses = lambda d, batch, fake: seen.append(batch.images) or losses(d, batch, fake)
    (batch,) = list(run.batches.epoch(0, len(run.batches) - 1))
    run.train_step(batch)
    assert [len(images) for images in seen] == [8, 8] and torch.equal(torch.cat(seen), batch.images)
    counts = {name: next(iter(o.state.values()))["step"].item() for name, o in run.optimizers.items()}
    assert counts == {"generator": 1, "discriminator": 2}


def test_two_time_scales_reach_the_optimizers(tmp_path):
    run = trainer(tmp_path, discriminator_learning_rate=2e-3, learning_rate=1e-4)
    run.train_step(next(run.batches.epoch(0)))
    rates = {name: optimizer.param_groups[0]["lr"] for name, optimizer in run.optimizers.items()}
    assert rates == {"generator": 1e-4, "discriminator": pytest.approx(2e-3)}
    run.config.decay, run.step = 1.0, run.planned_steps // 2
    run.train_step(next(run.batches.epoch(0)))
    rates = {name: optimizer.param_groups[0]["lr"] for name, optimizer in run.optimizers.items()}
    assert rates == {"generator": 5e-5, "discriminator": pytest.approx(1e-3)}


def test_normalization_follows_the_penalty_and_batch_norm_beside_it_is_refused(tmp_path):
    dataset = ImageDataset("noise", torch.zeros(8, 1, 16, 16, dtype=torch.uint8), None)

    def kinds(**settings):
        discriminator = DCGANConfig(**settings, image_size=16, base_channels=2).build(dataset)[1]
        return {type(m) for m in discriminator.main}, discriminator

    assert nn.BatchNorm2d in kinds()[0]
    assert nn.GroupNorm in kinds(gradient_penalty=10.0)[0] and nn.BatchNorm2d not in kinds(gradient_penalty=10.0)[0]
    layers, discriminator = kinds(spectral_norm=True)
    assert nn.BatchNorm2d not in layers and nn.GroupNorm not in layers
    convolutions = [m for m in discriminator.main if isinstance(m, nn.Conv2d)]
    assert all(is_parametrized(m, "weight") and m.bias is not None for m in convolutions)
    assert nn.BatchNorm2d in kinds(spectral_norm=True, discriminator_normalization="batch")[0]
    with pytest.raises(ValueError, match="--discriminator-normalization must be layer or none with --gradient-penalty"):
        DCGANConfig(gradient_penalty=10.0, discriminator_normalization="batch")
    with pytest.raises(ValueError, match="discriminator_normalization must be one of batch, layer, none, got 'x'"):
        dcgan(16, discriminator_normalization="x")


def test_perceptrons_side_by_side_take_the_same_terms(tmp_path):
    images = torch.randint(0, 256, (40, 1, 6, 6), dtype=torch.uint8)
    config = GANConfig(image_size=6, batch_size=2, hidden_features=4, max_steps=2, device="cpu", log_every=1, epochs=1,
                       generator_loss="wasserstein", gradient_penalty=10.0, output=str(tmp_path))
    run = Trainer(config, ImageDataset("noise", images, torch.arange(40) % 10))
    run.train()
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["gradient_penalty"] > 0
