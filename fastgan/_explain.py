"""explain(): which path a call of an operator takes, and why."""

import inspect
import os

import torch

from fastgan import _extension, ops
from fastgan.ops._conv import explicit_padding, fits_cuda_loop, group_obstacle, pair
from fastgan.ops.conv_stack import fits_minimal_filtering, fits_to_pixel

# kMaxSide in csrc/cpu/conv4x4s2.cpp.
MAX_FILTERED_SIDE = 256


def explain(op, *args, **kwargs):
    """Which path a call takes and why, without making the call: nothing is computed and no buffer changes.

    Args:
        op: a function of :mod:`fastgan.ops`, or its name.
        *args: what the call would be given.
        **kwargs: likewise.

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
    if "output_padding" not in call.arguments and isinstance(call.arguments.get("padding"), str):
        given = [call.arguments[key] for key in ("input", "weight", "stride", "padding", "dilation")]
        call.arguments["input"], call.arguments["padding"] = explicit_padding(name, *given)
    path, *reasons = _path(name, input, call.arguments)
    if "weight" in call.arguments and path not in (_PLAIN, _SHAPES):
        reasons.append(f"convolution: {_convolution_loop(call.arguments)}")
    where = f"{name} of {_name(input.dtype)} {list(input.shape)} on {input.device}"
    return "\n  ".join([f"{where}: {path}", *reasons])


_PLAIN, _SHAPES = "plain PyTorch", "shapes only"


def _plain(name, reason):
    strict = ["FASTGAN_STRICT=1 makes this call an error"] if _extension.strict() else []
    return _PLAIN, f"{name}_reference, because {reason}", *strict


def _path(name, input, arguments):
    """(the path, reasons...)."""
    device = input.device.type
    group = arguments.get("process_group") if arguments.get("training") else None
    if (reason := _extension.why_plain(name, input.device, group_obstacle(group, input.device))) is not None:
        return _plain(name, reason)
    if device == "meta":
        return _SHAPES, "a meta tensor has no values to compute with"
    if device == "cuda" and input.dtype == torch.float64:
        return "PyTorch's operators", "float64 has no fused CUDA kernels"
    below = arguments.get("activation") == "leaky_relu" and arguments["negative_slope"] < 0
    # The loops that do a layer as a stack of one keep the activation's argument then: conv_act in csrc/ops/conv_bn_act.cpp.
    if below and name in ("conv2d_act", "conv_transpose2d_act") and not (device == "cpu" and _has_own_loop(arguments)):
        return (
            "PyTorch's convolution and leaky_relu",
            "negative_slope is below 0, and the fused backward takes the sign of an activation's argument from its result",
        )
    info = _extension.build_info()
    if device == "cuda":
        devices = ", ".join(info["cuda_devices_run"]) or "none yet"
        return "fused CUDA kernels", info["cuda_reason"], f"run on these GPUs: {devices}"
    return "fused CPU kernels", f"instruction set {info['cpu_isa']}: {_why_this_isa()}"


def _operator(op):
    """(name, function) of an operator given by either."""
    operators = {name: getattr(ops, name) for name in ops.__all__ if callable(getattr(ops, name))}
    for name, function in operators.items():
        if op is function or op == name:
            return name, function
    raise ValueError(
        f"explain: op must be a function of fastgan.ops or its name, one of {', '.join(operators)}; got {op!r}"
    )


def _name(dtype):
    return str(dtype).removeprefix("torch.")


def _why_this_isa():
    if os.environ.get("FASTGAN_CPU_ISA"):
        return "FASTGAN_CPU_ISA asks for it"
    return "the widest of those compiled in that this machine has"


def _convolution_loop(arguments):
    """The main loop of a convolution and why it is the one."""
    device = arguments["input"].device.type
    dtype = arguments["input"].dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    in_dtype = f"in {_name(dtype)}"
    if device == "cpu":
        if dtype == torch.float32 and _is_channels_last(arguments["input"]) and _fits_minimal_filtering(arguments):
            return _minimal_filtering(arguments)
        if dtype in (torch.float32, torch.bfloat16) and (loop := _pixel_loop(arguments)):
            return loop
        if dtype == torch.bfloat16 and _fits_minimal_filtering(arguments):
            return _bfloat16_loop(arguments)
        return (
            f"ATen's (oneDNN) {in_dtype}; fastgan's minimal filtering takes float32 in channels_last (or any layout "
            "inside a Sequential given to fastgan.fuse), kernel 4, stride 2, padding 1, channels in multiples of "
            f"16 (up to 4 on the image side), and up to {MAX_FILTERED_SIDE} pixels a side of the smaller image; its loops for one "
            "pixel take kernels of the image's size, without padding"
        )
    if dtype.itemsize == 2 and _has_cuda_loop(arguments):
        return f"fastgan's for kernel 4 {in_dtype}, with batch statistics or activation in its epilogue"
    return (
        f"ATen's (cuDNN) {in_dtype}, since fastgan's take bfloat16 and float16, kernel 4 with stride 2, padding 1, or from or to "
        "one pixel; of float32 in channels_last they take such layers to and from one pixel of up to 4 channels and, if "
        "torch.backends.cudnn.allow_tf32, images of up to 4 channels and, on Hopper, more channels where tiles of 128 fill the GPU"
    )


def _has_own_loop(arguments):
    return _convolution_loop(arguments).startswith("fastgan's")


def _minimal_filtering(arguments):
    """What the loops of csrc/cpu/conv4x4s2.h do with a shape, and what that saves."""
    input, weight = arguments["input"], arguments["weight"]
    transposed = "output_padding" in arguments
    if weight.shape[1] <= 4:
        return (
            "fastgan's for images of up to 4 channels, batch norm and activation fused in: from the image minimal filtering "
            "along its rows, F(2, 2), 75% of direct convolution's multiplications; to it, and for the weight's gradient, "
            "direct products, since with so few channels transforms would cost more than they save"
        )
    height, width = (side if transposed else side // 2 for side in input.shape[2:])
    # Geometry in csrc/cpu/conv4x4s2_blocks.h
    fours = min(height, width) >= 8 and height % 4 == width % 4 == 0
    if fours and input.shape[0] * height * width >= (512 if transposed else 128):
        tiles, share = "F(4, 2)", 25 / 64
    else:
        # Only a convolution's input can have an odd side; its last output then meets no padding.
        padded = [(True, transposed or side % 2 == 0) for side in input.shape[2:]]
        products = [sum(_products(length, edge) for edge in edges) for length, edges in zip((height, width), padded)]
        tiles, share = "F(3, 2) and F(2, 2)", products[0] * products[1] / (16 * height * width)
    return (
        "fastgan's minimal filtering for kernel 4, stride 2, padding 1, batch norm and activation fused in: tiles of "
        f"{tiles} a side take about {share:.0%} of direct convolution's multiplications for {height}x{width} pixels"
    )


def _bfloat16_loop(arguments):
    """Which loop takes a layer in bfloat16 that has the shape for those of csrc/cpu/conv4x4s2.h: loop_dtype() and
    leaves_to_aten() in csrc/ops/conv_stack.cpp."""
    isa, input, weight = _extension.CPU_ISA, arguments["input"], arguments["weight"]
    image, has_products = weight.shape[1] <= 4, isa in ("avx512_bf16", "amx")
    if not _is_channels_last(input):
        return (
            "ATen's (oneDNN) in bfloat16; fastgan's loops take this in channels_last (or any layout inside a Sequential given "
            "to fastgan.fuse)"
        )
    if not has_products:
        why = "run on processors with AVX512-BF16 or AMX, which this is not"
    elif image:
        return "fastgan's in bfloat16, with direct products, batch norm and activation fused in"
    elif any(channels % 32 for channels in weight.shape[:2]):
        why = "take channels in multiples of 32" + " (of 16 inside a Sequential given to fastgan.fuse)" * (isa == "amx")
    elif input.shape[0] < 16:
        why = "take a layer like this from a batch of 16 on"
    elif isa == "amx":
        return "fastgan's in bfloat16, with direct products, batch norm and activation fused in"
    elif weight.dtype != torch.float32:
        why = "would add to the error of bfloat16 weights"
    else:
        return (
            "fastgan's in bfloat16, batch norm and activation fused in: minimal filtering along the rows, F(2, 2), 75% of "
            "direct convolution's multiplications"
        )
    if isa == "amx":
        return f"ATen's (oneDNN) in bfloat16; fastgan's loops {why}"
    pixels = input.shape[0] * (input.shape[2] // 2) * (input.shape[3] // 2)
    wants_gradients = torch.is_grad_enabled() and any(
        isinstance(value, torch.Tensor) and value.requires_grad for value in arguments.values()
    )
    if has_products and "output_padding" not in arguments and pixels >= 2048 and not wants_gradients:
        return f"ATen's (oneDNN) in bfloat16, faster for so many pixels without gradients; fastgan's loops with bfloat16 products {why}"
    return f"{_minimal_filtering(arguments)}; bfloat16 images, multiplied as floats: the loops with bfloat16 products {why}"


def _products(length, padded):
    """Multiplications of `length` outputs of two taps along an axis of four points: Axis in csrc/cpu/conv4x4s2_tiles.h."""
    triples, left = divmod(length, 3)
    if left == 1 and not padded:
        return 4 * (triples - 1) + 2 * 3
    return 4 * triples + (0, 1, 3)[left]


def _pixel_loop(arguments):
    """What fastgan's loops for layers from and to one pixel do, or None where they do not run: from_pixel_supported() and
    to_pixel_supported() in csrc/cpu."""
    input, weight = arguments["input"], arguments["weight"]
    padding, dilation = (pair(arguments[name]) for name in ("padding", "dilation"))
    if input.dim() != 4 or not input.is_contiguous(memory_format=torch.channels_last) or input.numel() == 0:
        return None
    if padding != (0, 0) or dilation != (1, 1) or arguments["groups"] != 1 or any(pair(arguments.get("output_padding", 0))):
        return None
    if "output_padding" in arguments:
        if tuple(input.shape[2:]) != (1, 1) or weight.shape[1] % 32:
            return None
        return "fastgan's for images from one pixel: a matrix product that reads the weight as it lies"
    if input.is_contiguous() or input.shape[2:] != weight.shape[2:] or not fits_to_pixel(weight.shape):
        return None
    return "fastgan's for images to one pixel: the image is read once each way, with the weight beside it"


def _is_channels_last(input):
    """As PyTorch takes it: of one channel, which is in both formats, the strides tell."""
    return (
        input.dim() == 4
        and input.is_contiguous(memory_format=torch.channels_last)
        and torch._prims_common.suggest_memory_format(input) == torch.channels_last
    )


def _fits_minimal_filtering(arguments):
    """The rule of conv4x4s2_supported() in csrc/cpu."""
    input, weight = arguments["input"], arguments["weight"]
    stride, padding, dilation = (pair(arguments[name]) for name in ("stride", "padding", "dilation"))
    if input.dim() != 4 or dilation != (1, 1) or not fits_minimal_filtering(weight.shape, stride, padding):
        return False
    if arguments["groups"] != 1 or any(pair(arguments.get("output_padding", 0))) or input.numel() == 0:
        return False
    sides = input.shape[2:] if "output_padding" in arguments else [side // 2 for side in input.shape[2:]]
    return all(2 <= side <= MAX_FILTERED_SIDE for side in sides)


def _has_cuda_loop(arguments):
    """The rule of known_geometry() in csrc/ops/cuda_conv_bn_act.cpp."""
    input, weight = arguments["input"], arguments["weight"]
    stride, padding, dilation = (pair(arguments[name]) for name in ("stride", "padding", "dilation"))
    if tuple(weight.shape[2:]) != (4, 4) or arguments["groups"] != 1 or dilation != (1, 1):
        return False
    small = input.shape[-2:] if "output_padding" in arguments else [side - 3 for side in input.shape[-2:]]
    return input.numel() > 0 and fits_cuda_loop(stride, padding, small)
