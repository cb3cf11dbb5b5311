"""explain(): which path a call of an operator takes, and why."""

import inspect
import os

import torch

from fastgan import _extension, ops


def explain(op, *args, **kwargs):
    """Which path a call takes and why, without making the call: nothing is computed and no buffer changes.

    Args:
        op: a function of :mod:`fastgan.ops`, or its name.
        *args, **kwargs: what the call would be given.

    Returns:
        str: the first line names the path, the lines after it the reasons; for a convolution also its main loop.

    Raises:
        ValueError: op is not an operator of fastgan.
        TypeError: the operator does not take these arguments.
    """
    name, function = _operator(op)
    try:
        call = inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"explain: {name} cannot be called like this: {error}") from None
    call.apply_defaults()
    input = next(iter(call.arguments.values()))
    if not isinstance(input, torch.Tensor):
        raise TypeError(f"explain: the first argument of {name} must be a torch.Tensor, got {type(input).__name__}")
    where = f"{name} of {str(input.dtype).removeprefix('torch.')} {list(input.shape)} on {input.device}"
    device = input.device.type
    if device == "meta" and _extension.has_kernels("cpu"):
        return f"{where}: only shapes are computed, since a meta tensor has no values"
    if not _extension.has_kernels(device):
        lines = [f"{where}: plain PyTorch ({name}_reference)", f"because {_extension.why_no_kernels(device)}"]
        if os.environ.get("FASTGAN_STRICT") == "1":
            lines.append("FASTGAN_STRICT=1 makes this call an error")
        return "\n  ".join(lines)
    if device == "cpu":
        path, reason = "fused CPU kernels", f"instruction set {_extension.build_info()['cpu_isa']}: {_why_this_isa()}"
    else:
        path, reason = "fused CUDA kernels", f"CUDA kernels: {_extension.build_info()['cuda_reason']}"
    lines = [f"{where}: {path}", reason]
    if "weight" in call.arguments:
        if not name.endswith("bn_act") and call.arguments["activation"] == "leaky_relu" and call.arguments["negative_slope"] < 0:
            lines = [
                f"{where}: PyTorch's convolution and leaky_relu",
                "negative_slope is below 0: the fused backward tells the sign of an activation's argument from its result",
            ]
        lines.append(f"convolution: {_convolution_loop(call.arguments)}")
    return "\n  ".join(lines)


def _operator(op):
    """(name, function) of an operator given by either."""
    operators = {name: getattr(ops, name) for name in ops.__all__ if callable(getattr(ops, name))}
    for name, function in operators.items():
        if op is function or op == name:
            return name, function
    raise ValueError(
        f"explain: op must be a function of fastgan.ops or its name, one of {', '.join(operators)}; got {op!r}"
    )


def _why_this_isa():
    if os.environ.get("FASTGAN_CPU_ISA"):
        return "FASTGAN_CPU_ISA asks for it"
    return "the widest of those compiled in that this machine has"


def _convolution_loop(arguments):
    """The main loop of a convolution and why it is the one: what convolution() of csrc/ops decides."""
    device = arguments["input"].device.type
    dtype = arguments["input"].dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    return f"ATen's in {str(dtype).removeprefix('torch.')}, which runs {'oneDNN' if device == 'cpu' else 'cuDNN'}"
