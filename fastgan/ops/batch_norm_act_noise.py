"""Batch normalisation, activation and Gaussian noise in one pass: what a perceptron does after its matrix product."""

import torch
import torch.nn.functional as F

from fastgan import _extension
from fastgan._arguments import takes_tensor
from fastgan.ops._conv import activate, check_activation
from fastgan.ops._dtypes import sums_dtype


@takes_tensor
def batch_norm_act_noise(
    input, bn_weight=None, bn_bias=None, running_mean=None, running_var=None, *, training=True, momentum=0.1, eps=1e-5,
    activation="leaky_relu", negative_slope=0.2, noise_std=0.0, seed=None,
):  # fmt: skip
    """``activation(F.batch_norm(input, ...)) + noise_std * N(0, 1)``.

    Args:
        input: (N, C), (N, C, L) or (N, C, H, W); float32, float64, bfloat16 or float16. Channels are dimension 1.
        bn_weight, bn_bias: (C,) or None for 1 and 0.
        running_mean, running_var: (C,) or None; updated when training, used when not.
        training: normalise by the statistics of the batch.
        momentum, eps: as F.batch_norm.
        activation: "relu", "leaky_relu", "tanh", "sigmoid" or "identity".
        negative_slope: of leaky_relu.
        noise_std: standard deviation of the noise added, at least 0.
        seed: int64 scalar tensor on the CPU that decides the noise; None draws one from PyTorch's generator, so that
            torch.manual_seed makes the noise reproducible. A given seed gives the same noise for any number of
            threads, but different noise for another memory format.

    Returns:
        Tensor of input's shape, dtype and memory format.

    Raises:
        ValueError, TypeError, RuntimeError: shapes, dtypes or devices that do not fit, or one value per channel when
            training; each names the argument. Nothing has been changed then.

    Derivatives of every order, the first by a fused kernel. Under autocast input keeps the dtype it comes in, as
    F.batch_norm's does. One pass forward and one backward on the CPU; on CUDA PyTorch's own operators run. The noise is
    that of Threefry 2x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) and Box and Muller (1958).
    """
    arguments = (input, bn_weight, bn_bias, running_mean, running_var)
    options = dict(
        training=training, momentum=momentum, eps=eps, activation=activation, negative_slope=negative_slope,
        noise_std=noise_std,
    )  # fmt: skip
    if not _extension.runs_fused("batch_norm_act_noise", input):
        return batch_norm_act_noise_reference(*arguments, seed=seed, **options)
    return torch.ops.fastgan.batch_norm_act_noise.default(*arguments, seed, **options)


def batch_norm_act_noise_reference(
    input, bn_weight=None, bn_bias=None, running_mean=None, running_var=None, *, training=True, momentum=0.1, eps=1e-5,
    activation="leaky_relu", negative_slope=0.2, noise_std=0.0, seed=None,
):  # fmt: skip
    """batch_norm_act_noise in plain PyTorch. Its noise has the same distribution and other values."""
    check_activation("batch_norm_act_noise", activation, negative_slope)
    if not noise_std >= 0:
        raise ValueError(f"batch_norm_act_noise: noise_std must be at least 0, got {noise_std}")
    generator = torch.Generator(input.device).manual_seed(int(seed)) if noise_std and seed is not None else None
    z = F.batch_norm(input, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps)
    output = activate("batch_norm_act_noise", z, activation, negative_slope)
    if noise_std == 0:
        return output
    return output + noise_std * torch.randn(output.shape, generator=generator, device=output.device, dtype=output.dtype)


if _extension.has_kernels("cpu"):

    @torch.library.register_fake("fastgan::batch_norm_act_noise_forward")
    def _(
        input, bn_weight, bn_bias, running_mean, running_var, seed, training, momentum, eps, activation, negative_slope,
        noise_std,
    ):  # fmt: skip
        mean = input.new_empty([input.shape[1]], dtype=sums_dtype(input))
        return _contiguous_like(input), mean, torch.empty_like(mean)

    @torch.library.register_fake("fastgan::batch_norm_act_noise_backward")
    def _(
        grad_output, input, mean, invstd, bn_weight, bn_bias, training, activation, negative_slope, output_mask
    ):
        def parameter(wanted, like):
            return torch.empty_like(like) if wanted and like is not None else input.new_empty([0])

        return (
            _contiguous_like(input) if output_mask[0] else input.new_empty([0]),
            parameter(output_mask[1], bn_weight),
            parameter(output_mask[2], bn_bias),
        )

    def _contiguous_like(input):
        """Channels_last where input is so and not contiguous as well, else contiguous."""
        channels_last = (
            input.dim() == 4
            and not input.is_contiguous()
            and input.is_contiguous(memory_format=torch.channels_last)
        )
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        return torch.empty_like(input, memory_format=memory_format)
