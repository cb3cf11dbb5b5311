"""Loading of the compiled extension, and what is known about it."""

import os
import re
import sys
import warnings

import torch
from torch.autograd import forward_ad

try:
    from fastgan import _build_config
except ImportError:
    _build_config = None

_C = None
_missing_reason = None


def _release(version):
    return version.split("+")[0]


if _build_config is None:
    _missing_reason = "fastgan was not installed (no compiled extension beside the sources); run `pip install .`"
elif _release(_build_config.TORCH_VERSION) != _release(torch.__version__):
    raise ImportError(
        f"fastgan {_build_config.VERSION} was built against PyTorch {_build_config.TORCH_VERSION}, but PyTorch "
        f"{torch.__version__} is installed. Build it again against this one:\n"
        "    pip install --force-reinstall --no-deps .      (in the folder of fastgan's sources)"
    )
else:
    try:
        from fastgan import _C
    except ImportError as error:
        _C = None
        _missing_reason = f"the compiled extension fastgan._C is missing or could not be loaded: {error}"

# The instruction set of the CPU kernels, None without them. FASTGAN_CPU_ISA is read here, once.
CPU_ISA = None if _C is None else _C.cpu_info()["cpu_isa"]
_DEVICES = frozenset() if _C is None else frozenset({"cpu", "cuda"} if _build_config.CUDA_KERNELS else {"cpu"})
_warned = set()
# Whose lines a warning does not name; with the separator, since torchvision lies beside torch.
_SKIPPED = tuple(os.path.join(os.path.dirname(file), "") for file in (__file__, torch.__file__))

# The GPUs on which the CUDA kernels have been run; benchmarks/results/cuda_h200_2026-11-27.md says what was tested there.
CUDA_DEVICES_RUN = ("NVIDIA H200",)

# The operators of fastgan.ops that have kernels for the CPU alone.
WITHOUT_CUDA_KERNEL = frozenset({"batch_norm_act_noise"})


def has_kernels(device_type):
    """Whether compiled kernels exist for tensors on `device_type` ("cpu", "cuda", ...)."""
    return device_type in _DEVICES


def why_no_kernels(device_type):
    """The cause, for warnings, errors and build_info(); None where there are kernels."""
    if has_kernels(device_type):
        return None
    if _C is None:
        return _missing_reason
    if device_type == "cuda":
        return f"the CUDA kernels were not built: {_build_config.CUDA_REASON}"
    return f"fastgan has kernels for cpu and cuda, not for {device_type}"


# By number of the GPU: see why_not_on_gpu.
_gpus = {}


def why_not_on_gpu(device):
    """Why the compiled CUDA kernels do not run on the GPU `device`, for warnings; None where they do. Asked once a GPU."""
    if torch.compiler.is_compiling():  # which could not trace the question
        return None
    if device.index not in _gpus:
        properties = torch.cuda.get_device_properties(device.index)
        _gpus[device.index] = _why_not_on(properties.name, (properties.major, properties.minor), _build_config.CUDA_ARCHITECTURES)
    return _gpus[device.index]


def _why_not_on(name, capability, architectures):
    for architecture in architectures:
        parts = re.fullmatch(r"(\d+)\.(\d)(a?)(\+PTX)?", architecture)
        if parts is None:  # a name, such as Ampere
            return None
        compiled = int(parts[1]), int(parts[2])
        if compiled == capability or not parts[3] and compiled <= capability and (compiled[0] == capability[0] or parts[4]):
            return None
    version = f"{capability[0]}.{capability[1]}"
    mend = (f'`TORCH_CUDA_ARCH_LIST="{version}" pip install --force-reinstall --no-deps .` compiles them for it' if capability >= (8, 0)
            else "they need 8.0 or more")
    return f"the CUDA kernels are compiled for compute capability {', '.join(architectures)}, and the {name} has {version}; {mend}"


def why_no_kernels_on(device):
    """Why no compiled kernel runs for tensors on `device`; None where they run."""
    reason = why_no_kernels(device.type)
    return why_not_on_gpu(device) if reason is None and device.type == "cuda" else reason


def runs_on(device):
    """Whether the compiled kernels run for tensors on `device`, which fuse() asks of every input; says why not on a GPU, once."""
    if device.type not in _DEVICES:
        return False
    if (reason := why_no_kernels_on(device)) is not None:
        leave_fast_path("the layers of a fused module", reason)
    return reason is None


# Whether a transform of torch.func is on. PyTorch's own autograd.Function asks the same.
_in_torch_func = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
TRANSFORMED = "torch.func's transforms (grad, vmap, jvp, ...) and forward-mode derivatives need PyTorch's own operators"


def transformed():
    """Whether a transform of torch.func, or a level of forward-mode derivatives, is on."""
    return _in_torch_func() or forward_ad._current_level >= 0


def runs_fused(op, input, obstacle=None):
    """Whether the kernels of `op` run on `input`; where not, says why, once. `obstacle` is what else speaks against it, None for
    nothing."""
    # The usual case is ahead of the general question, which costs a tenth of softmax_entropy at 100 x 10.
    if input.is_cpu and "cpu" in _DEVICES and obstacle is None and not transformed():
        return True
    reason = why_plain(op, input.device, obstacle)
    if reason is not None and (input.device.type != "meta" or reason is TRANSFORMED):
        leave_fast_path(op, reason)
    return reason is None


def why_plain(op, device, obstacle=None):
    """Why plain PyTorch runs in place of the kernels of `op` for tensors on `device`; None where they run."""
    if transformed():
        return TRANSFORMED
    if device.type == "meta":  # its shapes come from the fake kernels
        return why_no_kernels("cpu")
    if (reason := why_no_kernels_on(device)) is not None:
        return reason
    if device.type == "cuda" and op in WITHOUT_CUDA_KERNEL:
        return f"{op} has no CUDA kernel"
    return obstacle


def strict():
    """Whether plain PyTorch in place of a fused kernel is an error."""
    return os.environ.get("FASTGAN_STRICT") == "1"


def leave_fast_path(op, reason):
    """Called where plain PyTorch runs in place of a fused kernel: one warning a cause, or an error under
    FASTGAN_STRICT=1."""
    if strict():
        raise RuntimeError(f"{op}: FASTGAN_STRICT=1 and this call would run plain PyTorch: {reason}")
    if reason not in _warned and not torch.compiler.is_compiling():  # which cannot trace a warning
        _warned.add(reason)
        _warn(f"fastgan runs {op} in plain PyTorch: {reason}")


def _warn(message):
    """Warns of the nearest line that is neither fastgan's nor PyTorch's, as by `skip_file_prefixes` since Python 3.12."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_SKIPPED):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, RuntimeWarning, stacklevel=level)


def build_info():
    """What this installation of fastgan is made of.

    Returns:
        dict: ``version``; ``torch_version`` and ``cuda_version`` it was built against (None: not built, or without
        CUDA) and ``torch_running``; ``cpu_kernels``, ``cpu_isas_compiled``, ``cpu_isas_available`` (on this machine),
        ``cpu_isa`` (the one in use; environment variable FASTGAN_CPU_ISA overrides it); ``cuda_kernels``,
        ``cuda_architectures`` and ``cuda_reason``, which says why the CUDA kernels are there or not;
        ``cuda_devices_run``, the GPUs on which they have been run (for others only their logic was tested, on the CPU);
        ``cpu_reason`` where the CPU kernels are missing.
    """
    config = _build_config
    info = {
        "version": config.VERSION if config else None,
        "torch_version": config.TORCH_VERSION if config else None,
        "torch_running": torch.__version__,
        "cpu_kernels": _C is not None,
        "cpu_reason": _missing_reason,
        "cpu_isas_compiled": (),
        "cpu_isas_available": (),
        "cpu_isa": None,
        "cuda_version": config.CUDA_VERSION if config else None,
        "cuda_architectures": config.CUDA_ARCHITECTURES if config else (),
        "cuda_kernels": has_kernels("cuda"),
        "cuda_reason": config.CUDA_REASON if config else _missing_reason,
        "cuda_devices_run": CUDA_DEVICES_RUN,
    }
    if _C is not None:
        info.update(_C.cpu_info())
    return info
