"""Adversarial losses. All take logits, are to be minimised, and are computed in log space."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

from fastgan._arguments import check_tensor
from fastgan.ops._dtypes import sums_dtype
from fastgan.ops.softmax_entropy import softmax_entropy, softmax_entropy_cross_entropy

# With D = sigmoid(logit): -log D = softplus(-logit), -log(1 - D) = softplus(logit).
# The discriminator's: the mean over real samples and that over generated ones, of which the loss is the sum.
_DISCRIMINATOR_LOSSES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "minimax": (lambda real: F.softplus(-real).mean(), lambda fake: F.softplus(fake).mean()),
    "least_squares": (lambda real: 0.5 * (real - 1).square().mean(), lambda fake: 0.5 * fake.square().mean()),
    "hinge": (lambda real: F.relu(1 - real).mean(), lambda fake: F.relu(1 + fake).mean()),
    "wasserstein": (lambda real: -real.mean(), lambda fake: fake.mean()),
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


def discriminator_loss(
    real_logits: Tensor, fake_logits: Tensor, kind: str = "minimax", *, label_smoothing: float = 0.0
) -> Tensor:
    """Loss of the discriminator.

    Args:
        real_logits: the discriminator's output for real samples, [N] or [N, ...], floating point.
        fake_logits: its output for generated samples, [M] or [M, ...] with the same trailing shape.
        kind: ``"minimax"`` (Goodfellow et al. 2014, equation 1: ``-log D(x) - log(1 - D(G(z)))``),
            ``"least_squares"`` (Mao et al. 2017, equation 9), ``"hinge"`` (Lim and Ye 2017, equation
            10) or ``"wasserstein"`` (Arjovsky et al. 2017, equation 3, negated; it needs a Lipschitz
            constraint from elsewhere (:func:`gradient_penalty`)).
        label_smoothing: for ``"minimax"``: real samples get the label ``1 - label_smoothing``, generated ones
            keep 0 (one-sided: Salimans et al. 2016, arXiv 1606.03498, section 3.4, where it is 0.1), so the
            best discriminator does not grow ever surer. In [0, 1).

    Returns:
        Scalar, to be minimised; float32 for half-precision logits, else of the logits' dtype.
        Differentiable to any order.

    Raises:
        ValueError: an unknown kind, logits that are empty, not floating point or of differing shapes,
            label smoothing out of range or with a kind that has no labels to smooth.
    """
    function = "discriminator_loss"
    loss = _real_loss(function, real_logits, kind, label_smoothing) + _fake_loss(function, fake_logits, kind)
    if real_logits.shape[1:] != fake_logits.shape[1:]:
        raise ValueError(
            f"{function}: fake_logits must have the shape of real_logits apart from the batch, "
            f"got {list(fake_logits.shape)} beside {list(real_logits.shape)}"
        )
    return loss


def real_loss(real_logits: Tensor, kind: str = "minimax", *, label_smoothing: float = 0.0) -> Tensor:
    """The part of :func:`discriminator_loss` over real samples.

    ``real_loss(...).backward()`` before the discriminator sees generated samples, then :func:`fake_loss`, gives the
    gradients of the sum, and holds one pass of the discriminator in memory instead of two.

    Args:
        real_logits, kind, label_smoothing: as for :func:`discriminator_loss`.

    Returns:
        Scalar, as of :func:`discriminator_loss`.

    Raises:
        ValueError: as :func:`discriminator_loss`.
    """
    return _real_loss("real_loss", real_logits, kind, label_smoothing)


def fake_loss(fake_logits: Tensor, kind: str = "minimax") -> Tensor:
    """The part of :func:`discriminator_loss` over generated samples; see :func:`real_loss`.

    Args:
        fake_logits, kind: as for :func:`discriminator_loss`.

    Returns:
        Scalar, as of :func:`discriminator_loss`.

    Raises:
        ValueError: as :func:`discriminator_loss`.
    """
    return _fake_loss("fake_loss", fake_logits, kind)


def _real_loss(function: str, real_logits: Tensor, kind: str, label_smoothing: float) -> Tensor:
    loss, _ = _lookup(function, _DISCRIMINATOR_LOSSES, kind)
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"{function}: label_smoothing must be at least 0 and below 1, got {label_smoothing}")
    if label_smoothing and kind != "minimax":
        raise ValueError(
            f"{function}: label_smoothing must be 0 with kind {kind!r}: only minimax has labels, got {label_smoothing}"
        )
    real = _checked_logits(function, "real_logits", real_logits)
    # (1 - s) softplus(-r) + s softplus(r) = softplus(-r) + s r
    return loss(real) + label_smoothing * real.mean() if label_smoothing else loss(real)


def _fake_loss(function: str, fake_logits: Tensor, kind: str) -> Tensor:
    _, loss = _lookup(function, _DISCRIMINATOR_LOSSES, kind)
    return loss(_checked_logits(function, "fake_logits", fake_logits))


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


def gradient_penalty(
    discriminator: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, *, target: float = 1.0, weight: float = 10.0
) -> Tensor:
    """Penalty that keeps the norm of the discriminator's gradient near ``target`` between real and generated samples: WGAN-GP
    (Gulrajani et al. 2017, arXiv 1704.00028, equation 3 and algorithm 1).

    ``weight * E (||grad D(x)|| - target)^2`` at ``x = e real + (1 - e) fake``, e from U(0, 1) for each pair. Add it to
    :func:`discriminator_loss`, which with ``kind="wasserstein"`` needs it. The discriminator should judge each sample
    by itself: with batch norm the gradient of a sample's logit also runs through the others, and the penalty no
    longer bounds the gradient (the paper's section 4); take layer norm or none, see
    ``fastgan.models.dcgan(discriminator_normalization=...)``.

    Args:
        discriminator: maps samples to logits. Called once, without autocast: half precision loses the small
            gradients the penalty is made of.
        real: real samples, [N, ...], floating point; taken as constant.
        fake: generated samples of that shape; taken as constant.
        target: the gradient norm wanted; 0 for the penalty of Thanh-Tung et al. 2019.
        weight: the factor in front, lambda in the paper.

    Returns:
        Scalar, float32 for half-precision samples; its gradients reach the discriminator's parameters.

    Raises:
        ValueError: samples that are empty, not floating point or of differing shapes, a weight below 0.
    """
    function = "gradient_penalty"
    _checked_logits(function, "real", real)
    _checked_logits(function, "fake", fake)
    if real.shape != fake.shape:
        raise ValueError(f"{function}: fake must have the shape of real, {list(real.shape)}, got {list(fake.shape)}")
    _check_weight(function, weight)
    share = torch.rand([len(real)] + [1] * (real.dim() - 1), device=real.device, dtype=real.dtype)
    between = fake.detach().to(real.dtype).lerp(real.detach(), share)
    slopes = torch.linalg.vector_norm(_input_gradients(discriminator, between), dim=1)
    return weight * (slopes - target).square().mean()


def r1_penalty(discriminator: Callable[[Tensor], Tensor], real: Tensor, *, weight: float = 10.0) -> Tensor:
    """Penalty on the discriminator's gradient at real samples: R1 (Mescheder et al. 2018, arXiv 1801.04406, equation 9).

    ``weight / 2 * E ||grad D(x)||^2``: the discriminator should be flat where generator and data agree; without
    this training need not converge. Add it to :func:`discriminator_loss`, of any kind.

    Args:
        discriminator: maps samples to logits. Called once, without autocast.
        real: real samples, [N, ...], floating point; taken as constant.
        weight: gamma in the paper.

    Returns:
        Scalar, float32 for half-precision samples; its gradients reach the discriminator's parameters.

    Raises:
        ValueError: samples that are empty or not floating point, a weight below 0.
    """
    _checked_logits("r1_penalty", "real", real)
    _check_weight("r1_penalty", weight)
    return 0.5 * weight * _input_gradients(discriminator, real.detach()).square().sum(1).mean()


def _input_gradients(discriminator: Callable[[Tensor], Tensor], samples: Tensor) -> Tensor:
    """Gradients [N, features] of each sample's logits in the sample, themselves differentiable."""
    samples = samples.requires_grad_()  # a tensor of our own: detached or just computed
    with torch.enable_grad(), torch.autocast(samples.device.type, enabled=False):
        (gradients,) = torch.autograd.grad(discriminator(samples).sum(), samples, create_graph=True)
    gradients = gradients.reshape(len(gradients), -1)
    return gradients.float() if gradients.dtype in (torch.float16, torch.bfloat16) else gradients


def _check_weight(function: str, weight: float) -> None:
    if not weight >= 0:
        raise ValueError(f"{function}: weight must be at least 0, got {weight}")


def _lookup(function: str, table: dict[str, Any], kind: str) -> Any:
    if kind not in table:
        raise ValueError(f"{function}: kind must be one of {', '.join(table)}, got {kind!r}")
    return table[kind]


def _checked_logits(function: str, name: str, logits: Tensor) -> Tensor:
    check_tensor(function, name, logits)
    if not logits.is_floating_point():
        raise ValueError(f"{function}: {name} must be a floating-point tensor, got {logits.dtype}")
    if logits.dim() == 0 or logits.numel() == 0:
        raise ValueError(f"{function}: {name} must have shape [N] or [N, ...] with N > 0, got {list(logits.shape)}")
    # A mean over a batch loses digits in half precision.
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def catgan_discriminator_loss(
    real_logits: Tensor,
    fake_logits: Tensor,
    labeled_logits: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    supervised_weight: float = 1.0,
    marginal_weight: float = 1.0,
    process_group: "torch.distributed.ProcessGroup | None" = None,
) -> Tensor:
    """Loss of the CatGAN's discriminator, a classifier (Springenberg 2015, arXiv 1511.06390).

    ``-marginal_weight * H[mean p(real)] + E H[p(real)] - E H[p(fake)] + supervised_weight * CE(labeled, labels)``,
    with p the softmax of the logits: sure about every real image, uses all categories equally, unsure about every
    generated one. The sign of the cross-entropy is that of a term to be minimised.

    Args:
        real_logits: logits of real images, [N, K].
        fake_logits: logits of generated images, [M, K].
        labeled_logits: logits of images whose class is known, [L, K]; ``real_logits`` itself where every real image
            is labeled, which then costs no further pass. None without labels.
        labels: their classes, int64 [L] in [0, K), or -100 for an image without a label.
        supervised_weight: weight of the cross-entropy.
        marginal_weight: weight of the marginal entropy, 1 in the paper; a larger one keeps categories from falling
            empty.
        process_group: a group of ``torch.distributed``, each process holding part of the batch: the marginal is then that
            of the real images of all of them (one all-reduce of K + 1 numbers). Gradients averaged over the
            processes, as by DistributedDataParallel, are those of one process with the whole batch.

    Returns:
        Scalar in nats, to be minimised; float64 for float64 logits, else float32. Differentiable to any order, with
        a process group to the first.

    Raises:
        ValueError: shapes that do not fit, labels without logits or the reverse.
        IndexError: a label outside [0, K) other than -100.
    """
    function = "catgan_discriminator_loss"
    classes = _checked_categories(function, "real_logits", real_logits)
    for name, logits in (("fake_logits", fake_logits), ("labeled_logits", labeled_logits)):
        if logits is not None and _checked_categories(function, name, logits) != classes:
            raise ValueError(
                f"{function}: {name} must have {classes} categories like real_logits, got shape {list(logits.shape)}"
            )
    if (labeled_logits is None) != (labels is None):
        missing, given = ("labels", "labeled_logits") if labels is None else ("labeled_logits", "labels")
        raise ValueError(f"{function}: {missing} must be given with {given}, got None")
    real, _ = _real_categories_loss(real_logits, labeled_logits, labels, supervised_weight, marginal_weight, process_group)
    return real + _fake_categories_loss(fake_logits)


def _real_categories_loss(
    real_logits: Tensor, labeled_logits: Tensor | None, labels: Tensor | None, supervised_weight: float,
    marginal_weight: float, process_group: "torch.distributed.ProcessGroup | None",
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The terms of :func:`catgan_discriminator_loss` that are of real images, labeled or not: their sum, and each."""
    cross_entropy = None
    if labels is not None:
        check_tensor("catgan_discriminator_loss", "labels", labels)
    if labels is not None and labels.shape != labeled_logits.shape[:1]:
        raise ValueError(
            f"catgan_discriminator_loss: labels must have shape [{len(labeled_logits)}] (a class for each row of "
            f"labeled_logits), got {list(labels.shape)}"
        )
    if labels is not None and labeled_logits is real_logits and process_group is None:
        conditional, marginal, cross_entropy = softmax_entropy_cross_entropy(real_logits, labels)
    else:
        conditional, marginal = _entropies(real_logits, process_group)
        if labels is not None:
            _, _, cross_entropy = softmax_entropy_cross_entropy(labeled_logits, labels)
    loss = conditional - marginal_weight * marginal
    terms = {"entropy_real": conditional.detach(), "entropy_marginal": marginal.detach()}
    if cross_entropy is not None:
        loss = loss + supervised_weight * cross_entropy
        terms["cross_entropy"] = cross_entropy.detach()
    return loss, terms


def _fake_categories_loss(fake_logits: Tensor) -> Tensor:
    """The term of :func:`catgan_discriminator_loss` that is of generated images."""
    return -softmax_entropy(fake_logits)[0]


def catgan_generator_loss(
    fake_logits: Tensor, *, process_group: "torch.distributed.ProcessGroup | None" = None
) -> Tensor:
    """Loss of the CatGAN's generator (Springenberg 2015, arXiv 1511.06390).

    ``-H[mean p(fake)] + E H[p(fake)]``: each generated image belongs clearly to one category, and all categories
    come up equally often.

    Args:
        fake_logits: the discriminator's logits of generated images, [N, K].
        process_group: as in :func:`catgan_discriminator_loss`.

    Returns:
        Scalar in nats, to be minimised; float64 for float64 logits, else float32. Differentiable to any order, with
        a process group to the first.

    Raises:
        ValueError: logits that are not [N, K] with N > 0, or not floating point.
    """
    _checked_categories("catgan_generator_loss", "fake_logits", fake_logits)
    conditional, marginal = _entropies(fake_logits, process_group)
    return conditional - marginal


def feature_matching_loss(
    real_features: Tensor, fake_features: Tensor, *, process_group: "torch.distributed.ProcessGroup | None" = None
) -> Tensor:
    """Loss of a generator that matches mean features (Salimans et al. 2016, arXiv 1606.03498, section 3.1).

    The mean absolute difference of the two batches' mean features, which their code minimises; the paper writes the
    squared norm. An alternative to :func:`catgan_generator_loss`. After batch norm in training mode the means of two
    batches are equal whatever the images: let it normalise both by its running statistics, or in one batch.

    Args:
        real_features: a hidden layer of the discriminator for real images, [N, F]; taken as constant.
        fake_features: the same layer for generated images, [M, F].
        process_group: a group of ``torch.distributed`` whose processes hold equally many rows: the means are then those
            of all of them. Gradients averaged over the processes are those of one process with the whole batch.

    Returns:
        Scalar, float32 for half-precision features.

    Raises:
        ValueError: features of different length, or no [N, F] tensors.
    """
    real = _checked_logits("feature_matching_loss", "real_features", real_features)
    fake = _checked_logits("feature_matching_loss", "fake_features", fake_features)
    if real.dim() != 2 or fake.shape[1:] != real.shape[1:]:
        raise ValueError(
            f"feature_matching_loss: real_features and fake_features must have shapes [N, F] and [M, F], "
            f"got {list(real.shape)} and {list(fake.shape)}"
        )
    difference = real.detach().mean(0) - fake.mean(0)
    if process_group is not None:
        whole = difference.detach().clone()
        distributed.all_reduce(whole, group=process_group)
        # The value of the whole batch with this process's gradient.
        difference = difference + (whole / distributed.get_world_size(process_group) - difference.detach())
    return difference.abs().mean()


def _checked_categories(function: str, name: str, logits: Tensor) -> int:
    check_tensor(function, name, logits)
    if logits.dim() != 2 or logits.numel() == 0:
        raise ValueError(f"{function}: {name} must have shape [N, K] with N > 0 and K > 0, got {list(logits.shape)}")
    if not logits.is_floating_point():
        raise ValueError(f"{function}: {name} must be a floating-point tensor, got {logits.dtype}")
    return logits.shape[1]


def _entropies(logits: Tensor, process_group: Any) -> tuple[Tensor, Tensor]:
    if process_group is None:
        return softmax_entropy(logits)
    return _GlobalEntropies.apply(logits, process_group)


class _GlobalEntropies(torch.autograd.Function):
    """softmax_entropy of the rows of all processes, each of which holds some of them.

    The gradient a process gets for its rows is the whole batch's times the number of processes, and the conditional
    entropy it returns is its share times that number: averages over the processes are then the whole batch's values.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, process_group: Any) -> tuple[Tensor, Tensor]:
        log_p = F.log_softmax(logits.to(sums_dtype(logits)), 1).clamp_min(-1000)
        p = log_p.exp()
        sums = torch.cat([p.sum(0), p.new_tensor([len(p)])])
        distributed.all_reduce(sums, group=process_group)
        q, rows = sums[:-1] / sums[-1], sums[-1]
        share = distributed.get_world_size(process_group) / rows
        ctx.save_for_backward(logits, q, share)
        return -(p * log_p).sum() * share, -torch.special.xlogy(q, q).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_conditional: Tensor, grad_marginal: Tensor):
        logits, q, share = ctx.saved_tensors
        log_p = F.log_softmax(logits.to(q.dtype), 1).clamp_min(-1000)
        p = log_p.exp()
        terms = grad_conditional * log_p + grad_marginal * torch.where(q == 0, 1, q).log()
        return (share * p * ((p * terms).sum(1, keepdim=True) - terms)).to(logits.dtype), None
