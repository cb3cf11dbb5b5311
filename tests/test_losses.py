import math

import pytest
import torch

from fastgan.losses import (
    DISCRIMINATOR_LOSSES, GENERATOR_LOSSES, discriminator_loss, fake_loss, generator_loss, real_loss,
)


def test_minimax_losses_equal_the_formulas_of_goodfellow_2014():
    real, fake = torch.randn(50, dtype=torch.float64), torch.randn(70, dtype=torch.float64)
    d_real, d_fake = torch.sigmoid(real), torch.sigmoid(fake)
    expected = -(d_real.log().mean() + (1 - d_fake).log().mean())
    torch.testing.assert_close(discriminator_loss(real, fake), expected)
    torch.testing.assert_close(generator_loss(fake), -d_fake.log().mean())
    torch.testing.assert_close(generator_loss(fake, kind="minimax"), (1 - d_fake).log().mean())


def test_least_squares_hinge_and_wasserstein_by_hand():
    real, fake = torch.tensor([2.0, -0.5]), torch.tensor([0.5, -3.0])
    assert discriminator_loss(real, fake, "least_squares").item() == pytest.approx(0.5 * (3.25 / 2 + 9.25 / 2))
    assert discriminator_loss(real, fake, "hinge").item() == pytest.approx(1.5 / 2 + 1.5 / 2)
    assert discriminator_loss(real, fake, "wasserstein").item() == pytest.approx(-1.25 - 0.75)
    assert generator_loss(fake, "least_squares").item() == pytest.approx(0.5 * (0.25 + 16) / 2)
    assert generator_loss(fake, "hinge").item() == generator_loss(fake, "wasserstein").item() == 1.25


@pytest.mark.parametrize("kind", ["minimax", "non_saturating"])
def test_log_losses_and_gradients_stay_finite_for_extreme_logits(kind):
    fake = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], requires_grad=True)
    real = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = generator_loss(fake, kind) + discriminator_loss(real, fake)
    loss.backward()
    assert math.isfinite(loss.item())
    assert fake.grad.isfinite().all() and real.grad.isfinite().all()


def test_generator_gradient_of_minimax_vanishes_where_the_discriminator_is_sure():
    fake = torch.full((8,), -12.0, requires_grad=True)
    (saturating,) = torch.autograd.grad(generator_loss(fake, "minimax"), fake)
    (non_saturating,) = torch.autograd.grad(generator_loss(fake, "non_saturating"), fake)
    assert saturating.norm() < 1e-4 * non_saturating.norm()


@pytest.mark.parametrize("kind", GENERATOR_LOSSES)
def test_descending_the_generator_loss_raises_the_logits(kind):
    fake = torch.zeros(4, requires_grad=True)
    generator_loss(fake, kind).backward()
    assert (fake.grad < 0).all()


@pytest.mark.parametrize("kind", DISCRIMINATOR_LOSSES)
def test_descending_the_discriminator_loss_parts_real_from_fake(kind):
    real, fake = torch.full((4,), 0.3, requires_grad=True), torch.full((4,), 0.3, requires_grad=True)
    discriminator_loss(real, fake, kind).backward()
    assert (real.grad < 0).all() and (fake.grad > 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_reduced_in_float32(dtype):
    logits = torch.linspace(-3, 3, 4096).to(dtype)
    assert generator_loss(logits).dtype == torch.float32
    torch.testing.assert_close(generator_loss(logits), generator_loss(logits.float()), rtol=0, atol=0)
    torch.testing.assert_close(
        discriminator_loss(logits, -logits), discriminator_loss(logits.float(), -logits.float()), rtol=0, atol=0
    )


def test_unknown_kind_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"generator_loss: kind must be one of non_saturating, minimax.*'foo'"):
        generator_loss(torch.zeros(3), kind="foo")
    with pytest.raises(ValueError, match=r"discriminator_loss: kind must be one of minimax.*'non_saturating'"):
        discriminator_loss(torch.zeros(3), torch.zeros(3), kind="non_saturating")


def test_wrong_logits_are_refused_by_name():
    with pytest.raises(ValueError, match=r"fake_logits must be a floating-point tensor, got torch.int64"):
        generator_loss(torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"real_logits must have shape .* N > 0, got \[0\]"):
        discriminator_loss(torch.zeros(0), torch.zeros(3))
    with pytest.raises(ValueError, match=r"got \[\]"):
        generator_loss(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"got \[3\] beside \[3, 1\]"):
        discriminator_loss(torch.zeros(3, 1), torch.zeros(3))


@pytest.mark.parametrize("kind", DISCRIMINATOR_LOSSES)
def test_the_two_parts_one_after_the_other_give_the_gradients_of_the_whole(kind):
    real, fake = (torch.randn(7, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in (0, 1))
    loss = discriminator_loss(real, fake, kind)
    expected = torch.autograd.grad(loss, (real, fake))
    parts = real_loss(real, kind), fake_loss(fake, kind)
    for part in parts:
        part.backward()
    assert sum(parts) == loss
    assert torch.equal(real.grad, expected[0]) and torch.equal(fake.grad, expected[1])


def test_the_parts_name_themselves_in_errors():
    with pytest.raises(ValueError, match="real_loss: kind must be one of"):
        real_loss(torch.zeros(3), "no such")
    with pytest.raises(ValueError, match=r"fake_loss: fake_logits must have shape \[N\]"):
        fake_loss(torch.zeros(0))
