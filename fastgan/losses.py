"""Adversarial losses. All take logits, are minimised, and work in log space."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

# With D = sigmoid(logit): -log D = softplus(-logit), -log(1 - D) = softplus(logit).
_DISCRIMINATOR_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "minimax": lambda real, fake: F.softplus(-real).mean() + F.softplus(fake).mean(),
    "least_squares": lambda real, fake: 0.5 * ((real - 1).square().mean() + fake.square().mean()),
    "hinge": lambda real, fake: F.relu(1 - real).mean() + F.relu(1 + fake).mean(),
    "wasserstein": lambda real, fake: fake.mean() - real.mean(),
}
_GENERATOR_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "non_saturating": lambda fake: F.softplus(-fake).mean(),
    "minimax": lambda fake: -F.softplus(fake).mean(),
    "least_squares": lambda fake: 0.5 * (fake - 1).square().mean(),
    "hinge": lambda fake: -fake.mean(),
    "wasserstein": lambda fake: -fake.mean(),
}

DISCRIMINATOR_LOSSES = tuple(_DISCRIMINATOR_LOSSES)
GENERATOR_LOSSES = tuple(_GENERATOR_LOSSES)


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor, kind: str = "minimax") -> Tensor:
    """Loss of the discriminator.

    Args:
        real_logits: the discriminator's output for real samples, [N] or [N, ...], floating point.
        fake_logits: its output for generated samples, [M] or [M, ...] with the same trailing shape.
        kind: ``"minimax"`` (Goodfellow et al. 2014, equation 1: ``-log D(x) - log(1 - D(G(z)))``),
            ``"least_squares"`` (Mao et al. 2017, equation 9), ``"hinge"`` (Lim and Ye 2017, equation
            10) or ``"wasserstein"`` (Arjovsky et al. 2017, equation 3, negated; it needs a Lipschitz
            constraint from elsewhere).

    Returns:
        Scalar, to be minimised; float32 for half-precision logits, else of the logits' dtype.
        Differentiable to any order.

    Raises:
        ValueError: an unknown kind, logits that are empty, not floating point or of differing shapes.
    """
    loss = _lookup("discriminator_loss", _DISCRIMINATOR_LOSSES, kind)
    real = _checked_logits("discriminator_loss", "real_logits", real_logits)
    fake = _checked_logits("discriminator_loss", "fake_logits", fake_logits)
    if real.shape[1:] != fake.shape[1:]:
        raise ValueError(
            "discriminator_loss: fake_logits must have the shape of real_logits apart from the batch, "
            f"got {list(fake.shape)} beside {list(real.shape)}"
        )
    return loss(real, fake)


def generator_loss(fake_logits: Tensor, kind: str = "non_saturating") -> Tensor:
    """Loss of the generator.

    Args:
        fake_logits: the discriminator's output for generated samples, [N] or [N, ...], floating point.
        kind: ``"non_saturating"`` (Goodfellow et al. 2014, section 3: ``-log D(G(z))``), ``"minimax"``
            (their equation 1: ``log(1 - D(G(z)))``, whose gradient vanishes where the discriminator is
            sure), ``"least_squares"``, ``"hinge"`` or ``"wasserstein"`` (see :func:`discriminator_loss`).

    Returns:
        Scalar, to be minimised; float32 for half-precision logits, else of the logits' dtype.
        Differentiable to any order.

    Raises:
        ValueError: an unknown kind, logits that are empty or not floating point.
    """
    loss = _lookup("generator_loss", _GENERATOR_LOSSES, kind)
    return loss(_checked_logits("generator_loss", "fake_logits", fake_logits))


def _lookup(function: str, table: dict[str, Callable[..., Tensor]], kind: str) -> Callable[..., Tensor]:
    if kind not in table:
        raise ValueError(f"{function}: kind must be one of {', '.join(table)}, got {kind!r}")
    return table[kind]


def _checked_logits(function: str, name: str, logits: Tensor) -> Tensor:
    if not logits.is_floating_point():
        raise ValueError(f"{function}: {name} must be a floating-point tensor, got {logits.dtype}")
    if logits.dim() == 0 or logits.numel() == 0:
        raise ValueError(f"{function}: {name} must have shape [N] or [N, ...] with N > 0, got {list(logits.shape)}")
    # A mean over a batch loses digits in half precision.
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
