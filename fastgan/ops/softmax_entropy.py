"""The entropies of CatGAN's losses, from logits in log space."""

import torch
import torch.nn.functional as F

from fastgan import _extension
from fastgan._arguments import takes_tensor
from fastgan.ops._dtypes import sums_dtype


@takes_tensor
def softmax_entropy(logits):
    """Mean entropy of the predictions, and entropy of the mean prediction.

    The two numbers of the categorical GAN (Springenberg, "Unsupervised and semi-supervised learning with categorical
    generative adversarial networks", arXiv 1511.06390), computed in log space: finite for logits up to +-1e4, exactly
    0 where a row's probability lies on one class, and 0 log 0 = 0.

    Args:
        logits: ``[N, K]``, at least one row and one class; float32, float64, bfloat16 or float16. Rows may be strided.

    Returns:
        (conditional, marginal): two scalars in nats, float64 for float64 logits and float32 otherwise.
        conditional is the mean over n of H[softmax(logits_n)], in [0, log K]; marginal is
        H[mean over n of softmax(logits_n)], in [conditional, log K].

    Raises:
        RuntimeError, TypeError: logits is no floating-point ``[N, K]`` tensor with N >= 1 and K >= 1.

    Derivatives of every order; the first by a fused kernel.
    """
    if _extension.runs_fused("softmax_entropy", logits):
        return _softmax_entropy(logits)
    return softmax_entropy_reference(logits)


@takes_tensor
def softmax_entropy_cross_entropy(logits, labels, *, ignore_index=-100):
    """:func:`softmax_entropy` and the cross-entropy of the labeled rows, in one pass.

    Args:
        logits: ``[N, K]`` as for :func:`softmax_entropy`.
        labels: ``[N]`` int64, each in [0, K), or ignore_index for a row without label.
        ignore_index: the label that says "none".

    Returns:
        (conditional, marginal, cross_entropy): scalars in nats. The entropies are of all rows; cross_entropy is the
        mean over the labeled rows, and 0 where there are none.

    Raises:
        RuntimeError, TypeError: as :func:`softmax_entropy`, or labels has another shape, dtype or device.
        IndexError: a label is neither in [0, K) nor ignore_index (on CUDA, where a check would have to wait for the
            device, the cross-entropy is NaN instead).

    Derivatives of every order; the first by a fused kernel.
    """
    if _extension.runs_fused("softmax_entropy_cross_entropy", logits):
        return torch.ops.fastgan.softmax_entropy_cross_entropy.default(logits, labels, ignore_index=ignore_index)
    return softmax_entropy_cross_entropy_reference(logits, labels, ignore_index=ignore_index)


def softmax_entropy_reference(logits):
    """softmax_entropy in plain PyTorch."""
    _check(logits, "softmax_entropy")
    log_p = F.log_softmax(logits.to(sums_dtype(logits)), dim=1).clamp_min(-1000)
    p = log_p.exp()
    q = p.mean(0)
    # Not xlogy(q, q), whose derivative is 0 * inf = NaN where q is 0.
    log_q = torch.where(q == 0, 1, q).log()
    return -(p * log_p).sum(1).mean(), -(q * log_q).sum()


def softmax_entropy_cross_entropy_reference(logits, labels, *, ignore_index=-100):
    """softmax_entropy_cross_entropy in plain PyTorch."""
    op = "softmax_entropy_cross_entropy"
    _check(logits, op)
    if labels.shape != logits.shape[:1]:
        raise RuntimeError(
            f"{op}: labels must have shape [{logits.shape[0]}] (logits.size(0)), got {list(labels.shape)}"
        )
    if labels.dtype != torch.int64:
        raise TypeError(f"{op}: labels must be of dtype int64, got {labels.dtype}")
    labeled = labels != ignore_index
    bad = labeled & ((labels < 0) | (labels >= logits.shape[1]))
    # What depends on values cannot be transformed; F.cross_entropy refuses them then.
    if not _extension.transformed() and bad.any():
        row = int(bad.nonzero()[0])
        raise IndexError(
            f"{op}: labels must lie in [0, {logits.shape[1]}) (logits.size(1)) or equal ignore_index "
            f"({ignore_index}), got {int(labels[row])} at row {row}"
        )
    total = F.cross_entropy(
        logits.to(sums_dtype(logits)), labels, ignore_index=ignore_index, reduction="sum"
    )
    return *softmax_entropy_reference(logits), total / labeled.sum().clamp_min(1)


def _check(logits, op):
    shape = list(logits.shape)
    if logits.dim() != 2:
        raise RuntimeError(f"{op}: logits must have shape [N, K], got {shape}")
    if not logits.is_floating_point():
        raise TypeError(f"{op}: logits must be of a floating-point dtype, got {logits.dtype}")
    if logits.shape[0] == 0:
        raise RuntimeError(
            f"{op}: logits must have at least one row (the mean of none is undefined), got shape {shape}"
        )
    if logits.shape[1] == 0:
        raise RuntimeError(f"{op}: logits must have at least one class (K >= 1), got shape {shape}")


if _extension.has_kernels("cpu"):
    _softmax_entropy = torch.ops.fastgan.softmax_entropy.default

    @torch.library.register_fake("fastgan::softmax_entropy_forward")
    def _(logits, labels, ignore_index):
        _check(logits, "softmax_entropy")
        values = [logits.new_empty([], dtype=sums_dtype(logits)) for _ in range(3)]
        return (*values, values[0].new_empty([logits.shape[1]]), values[0].new_empty([logits.shape[0]]))

    @torch.library.register_fake("fastgan::softmax_entropy_backward")
    def _(
        grad_conditional, grad_marginal, grad_cross_entropy,
        logits, labels, ignore_index, mean_probabilities, log_normalizer,
    ):  # fmt: skip
        return logits.new_empty(logits.shape)
