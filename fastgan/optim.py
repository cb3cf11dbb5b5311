"""Adam, a parameter group in one kernel."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastgan import _extension

__all__ = ["Adam"]

_TYPES = {nn.Parameter, Tensor}  # other classes, as DTensor, mean more by their tensors than their memory


class Adam(torch.optim.Adam):
    """:class:`torch.optim.Adam`, whose step is one kernel for a whole parameter group.

    Arguments, ``state_dict``, hooks and numbers, to rounding, are those of :class:`torch.optim.Adam`; states go from either
    optimizer to the other. In step t, for a gradient g::

        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        parameter -= lr / (1 - beta1**t) * m / (sqrt(v) / sqrt(1 - beta2**t) + eps)

    The kernel takes the step of a group with ``fused=True``, or with ``fused=None`` and ``foreach=None``, the defaults, if

    - its parameters are float32 on the CPU or on one CUDA device, of any shape and any dense memory format, and their gradients
      and averages are too, with the same strides;
    - ``amsgrad``, ``maximize`` and ``differentiable`` are off; ``weight_decay`` may be of either kind;
    - ``lr`` is a number, or a float32 tensor with one element on that device or the CPU, where it may be float64, too;
    - the kernels for the device were built.

    Every other step is :class:`torch.optim.Adam`'s own; so are those for which :class:`torch.amp.GradScaler` sets ``grad_scale``.
    ``found_inf`` alone, one float32 on the device, is for the kernel: where it is not 0, nothing is changed.

    On CUDA a group of more than 72 tensors takes a launch for each 72. Step counts are float32 tensors on the device, and nothing
    waits for it. With ``capturable=True`` a step can be captured in a CUDA graph, as PyTorch's can, after at least one eager step.
    One optimizer's steps must not run on two streams at once.

    Raises:
        ValueError, RuntimeError: what :class:`torch.optim.Adam` raises: for settings out of range, sparse gradients, and a capture
            without ``capturable=True``.

    Source: Kingma and Ba, 2015, "Adam: A Method for Stochastic Optimization" (arXiv 1412.6980), algorithm 1, with eps added as in
    PyTorch.
    """

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all parameters that have a gradient. Returns the loss that ``closure`` returns, which is called first, with
        gradients enabled; None without one."""
        if torch.compiler.is_compiling():
            return _torch_step(self, closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        others = [group for group in self.param_groups if not self._step_in_kernel(group)]
        if others:
            groups, self.param_groups = self.param_groups, others
            try:
                _torch_step(self)
            finally:
                self.param_groups = groups
        return loss

    def _step_in_kernel(self, group: dict[str, Any]) -> bool:
        """Take the group's step in the kernel; False, and no step is made, where that is for PyTorch."""
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not parameters or not _is_for_kernel(group, parameters[0].device):
            return False
        return (self._step_on_cpu if parameters[0].is_cpu else self._step_on_cuda)(group, parameters)

    def _states(self, group: dict[str, Any]) -> tuple[list[Tensor], ...]:
        """Gradients, averages, averages of squares and step counts of the parameters that have a gradient; made where there are none."""
        gradients: list[Tensor] = []
        exp_avgs: list[Tensor] = []
        exp_avg_sqs: list[Tensor] = []
        steps: list[Tensor] = []
        self._init_group(group, [], gradients, exp_avgs, exp_avg_sqs, [], steps)
        return gradients, exp_avgs, exp_avg_sqs, steps

    def _step_on_cpu(self, group: dict[str, Any], parameters: list[Tensor]) -> bool:
        if getattr(self, "grad_scale", None) is not None or group["capturable"]:  # PyTorch raises for the latter
            return False
        gradients, exp_avgs, exp_avg_sqs, steps = self._states(group)
        if not _TYPES.issuperset(map(type, (*parameters, *gradients))) or not all([p.is_cpu for p in parameters]):
            return False
        lr, in_tensor = group["lr"], isinstance(group["lr"], Tensor)
        with torch.no_grad():
            return torch.ops.fastgan.adam_group_(
                parameters, gradients, exp_avgs, exp_avg_sqs, steps, 0.0 if in_tensor else lr, *group["betas"], group["eps"],
                group["weight_decay"], group["decoupled_weight_decay"], lr if in_tensor else None,
                getattr(self, "found_inf", None),
            )  # fmt: skip

    def _step_on_cuda(self, group: dict[str, Any], parameters: list[Tensor]) -> bool:
        device, lr, found_inf = parameters[0].device, group["lr"], getattr(self, "found_inf", None)
        if getattr(self, "grad_scale", None) is not None or not (found_inf is None or _is_scalar_on(device, found_inf)):
            return False
        if isinstance(lr, Tensor) and lr.device.type != "cpu" and not _is_scalar_on(device, lr):
            return False
        if not all(_is_float_on(device, parameter) and _is_float_on(device, parameter.grad) for parameter in parameters):
            return False
        if torch.cuda.is_current_stream_capturing() and not group["capturable"]:
            return False  # PyTorch raises

        gradients, exp_avgs, exp_avg_sqs, steps = self._states(group)
        for parameter, *others in zip(parameters, gradients, exp_avgs, exp_avg_sqs):
            if not _is_dense(parameter) or not all(_is_float_on(device, t) and _same_order(t, parameter) for t in others):
                return False
        for i, (parameter, step) in enumerate(zip(parameters, steps)):
            if not _is_float_on(device, step):  # PyTorch keeps it on the CPU unless told otherwise
                steps[i] = self.state[parameter]["step"] = step.to(device, torch.float32)

        # Not part of the state: 0 between steps.
        counters = vars(self).setdefault("_blocks_arrived", {})
        if device not in counters:
            counters[device] = torch.zeros(1, dtype=torch.int32, device=device)
        on_device = isinstance(lr, Tensor) and lr.device == device
        with torch.no_grad():
            torch.ops.fastgan.adam_(
                parameters, gradients, exp_avgs, exp_avg_sqs, steps, counters[device],
                0.0 if on_device else float(lr), *group["betas"], group["eps"], group["weight_decay"],
                group["decoupled_weight_decay"], lr if on_device else None, found_inf,
            )  # fmt: skip
        return True


def _torch_step(optimizer: torch.optim.Adam, closure: Callable[[], Any] | None = None) -> Any:
    """PyTorch's step alone: it may be wrapped in the hooks of step(), which the caller is in already."""
    step = torch.optim.Adam.step
    return (step.__wrapped__ if getattr(step, "hooked", False) else step)(optimizer, closure)


def _is_for_kernel(group: dict[str, Any], device: torch.device) -> bool:
    chosen = group["fused"] or (group["fused"] is None and group["foreach"] is None)
    others = group["amsgrad"] or group["maximize"] or group["differentiable"] or any(isinstance(b, Tensor) for b in group["betas"])
    return chosen and not others and _extension.why_no_kernels_on(device) is None


def _is_float_on(device: torch.device, tensor: Tensor) -> bool:
    return (
        type(tensor) in _TYPES and tensor.dtype == torch.float32 and tensor.device == device
        and tensor.layout == torch.strided
    )  # fmt: skip


def _is_scalar_on(device: torch.device, tensor: Tensor) -> bool:
    return _is_float_on(device, tensor) and tensor.numel() == 1


def _same_order(one: Tensor, other: Tensor) -> bool:
    """Whether the elements stand in memory in the same order: equal strides, but for dimensions of size 1."""
    if one.shape != other.shape:
        return False
    return one.stride() == other.stride() or all(
        size == 1 or a == b for size, a, b in zip(one.shape, one.stride(), other.stride())
    )


def _is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill their memory without gaps, in any order."""
    return tensor.is_contiguous() or _same_order(torch.empty_like(tensor, device="meta"), tensor)
