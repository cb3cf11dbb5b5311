"""fuse(): makes the layers of somebody's networks run on the fused operators.

Two ways lead there. An nn.Sequential finds its runs of layers anew at every call. A module with a forward of its own is
traced (fastgan/nn/_trace.py), and runs the trace in which runs of layers have become one call each (fastgan/nn/_graph.py).
"""

import copy
import functools
import inspect
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from fastgan.nn._graph import fuse_graph
from fastgan.nn._runs import (
    ACTIVATIONS, BATCH_NORMS, CONVOLUTIONS, HOOKS, Activation, is_plain, match_layer, run_children,
)
from fastgan.nn._trace import TENSOR, TRACING, Reads, Untraceable, kind, trace
from fastgan.nn.report import Fusion, FusionReport

# Traces of one module kept for different modes and arguments; a module that needs more runs its own forward.
_TRACES = 8


def fuse(module, inplace=False, report=False):
    """Makes the layers of `module` run on the fused operators.

    That is every run ``ConvTranspose2d | Conv2d [+ BatchNorm2d] [+ ReLU | LeakyReLU | Tanh | Sigmoid]``; on the CPU also every
    run ``Linear [+ BatchNorm1d] [+ ReLU | LeakyReLU | Tanh | Sigmoid] [+ fastgan.nn.GaussianNoise]`` of an ``nn.Sequential``,
    with noise before it, in float32 where it is faster (docs/fuse.md says when); elsewhere only what follows a ``Linear`` is
    fused. (Noise comes from the generator of :func:`fastgan.ops.batch_norm_act_noise`, not ``randn``'s.) ``SyncBatchNorm``
    may take the place of ``BatchNorm2d``, also on the CPU, where PyTorch's own does not run.

    Runs are found inside any ``nn.Sequential``, at any depth, and inside any module whose ``forward`` calls such layers
    and functions (``F.relu(self.bn1(self.conv1(x)))``), by tracing it with torch.fx for the mode and the arguments it
    is called with. A ``forward`` that a trace cannot represent is left as it is: control flow that depends on tensors, random
    choices, attributes set in ``forward``, ``with`` statements (docs/fuse.md lists all).

    Only the way modules compute changes. All layers stay where they were, with their names, parameters, buffers, hooks
    and modes: state_dict keys, initialisation by ``apply``, ``train()``/``eval()``, optimizers built before or after,
    deep copies, pickles and ``torch.func.functional_call`` work as before, ``isinstance`` of their classes holds, and
    outputs, gradients and running statistics agree with the plain module's to rounding. What cannot be fused runs as it
    did: layers with hooks, parametrizations (spectral or weight norm), subclasses of the layers named above, padding
    modes other than zeros; and all layers inside ``torch.func.grad``, ``vmap`` and ``jvp``. That is decided at each call, so hooks
    added later are honoured.

    Args:
        module: the ``nn.Module`` to fuse.
        inplace: change `module` itself and return it. Otherwise a new module is returned and `module` is left as it
            is; the two **share parameters and buffers**, so an optimizer built on `module` trains both. For an
            independent network pass ``copy.deepcopy(module)``.
        report: return ``(module, report)``. ``print(report)`` shows, convolution by convolution, what it was fused
            with or why it was not; its ``layers`` are the same as :class:`fastgan.nn.Fusion`.

    Returns:
        The fused module, or ``(module, report)``. Fusing it again changes nothing.

    Raises:
        TypeError: `module` is not an ``nn.Module``, or has an attribute that cannot be copied and `inplace` is not set.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"fuse: module must be a torch.nn.Module, got {type(module).__name__}")
    if not inplace:
        tensors = [*module.parameters(), *module.buffers()]
        # weight_norm and prune keep computed weights, which cannot be copied; at every call a hook computes them anew.
        attributes = [value for child in module.modules() for value in vars(child).values()]
        tensors += [value for value in attributes if isinstance(value, torch.Tensor) and not value.is_leaf]
        try:
            module = copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})
        except TypeError as error:  # a lock, an open file
            raise TypeError(f"fuse: module has an attribute that cannot be copied ({error}); pass inplace=True") from error
    found = {}
    for name, child in module.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(child, nn.Sequential):
            if type(child).forward in (nn.Sequential.forward, FusedSequential.forward):
                if not isinstance(child, FusedSequential):
                    child.__class__ = _fused_class(FusedSequential, type(child))
                _report_sequential(child, prefix, found)
        elif _may_be_traced(child):
            _fuse_by_trace(child, prefix, found)
    if not report:
        return module
    return module, FusionReport([_fusion(module, name, found) for name, child in module.named_modules()
                                 if isinstance(child, CONVOLUTIONS)])


class FusedSequential:
    """What fuse() mixes into the class of an nn.Sequential."""

    def forward(self, input):
        return run_children(list(self), input)

    def followed_by(self, module, input):
        """``module(self(input))``, with `module` as the last layer of this one's."""
        return run_children([*self, module], input) if is_plain(self) else module(self(input))

    def __reduce__(self):
        return _rebuild, (FusedSequential, _users_class(self)), _state(self)


class FusedModule:
    """What fuse() mixes into the class of a module that it has traced."""

    def forward(self, *args, **kwargs):
        plan = self._fastgan_plan(args, kwargs)
        if plan is None:
            return super().forward(*args, **kwargs)
        # The trace takes the tensors in the order of the call that it was made for.
        values = (*args, *[kwargs[name] for name in plan.keywords])
        return plan.run(self, *[value for value in values if isinstance(value, torch.Tensor)])

    def _fastgan_plan(self, args, kwargs):
        """The trace for these arguments and the state the module is in, or None: then its own forward runs."""
        arguments, keywords = [kind(value) for value in args], {name: kind(value) for name, value in kwargs.items()}
        plans = self.__dict__["_fastgan_plans"]
        plan = plans.find(self, arguments, keywords)
        if plan is None:
            if len(plans) >= _TRACES or torch.compiler.is_compiling() or Untraceable in (*arguments, *keywords.values()):
                return None
            with TRACING:
                plan = plans.find(self, arguments, keywords)  # which another thread may have made meanwhile
                if plan is None:
                    plan = _Plan.of(self, arguments, keywords)
                    plans.append(plan)
        return plan if plan.run is not None else None

    def _fastgan_run(self, input, *children):
        """What the trace calls in place of a run of layers: names of children, and activations."""
        return run_children(
            [self.get_submodule(child) if isinstance(child, str) else Activation(*child) for child in children], input
        )

    def __reduce__(self):
        return _rebuild, (FusedModule, _users_class(self)), _state(self)

    def __setstate__(self, state):
        super().__setstate__(state)
        self.__dict__["_fastgan_plans"] = _plans(self)


@functools.cache
def _fused_class(mixin, base):
    names = {"__module__": base.__module__, "_fastgan_base": base}
    if mixin is FusedModule:

        @functools.wraps(base.forward)  # torch.fx and inspect go by its signature
        def forward(self, *args, **kwargs):
            return FusedModule.forward(self, *args, **kwargs)

        names["forward"] = forward
    return type(f"Fused{base.__name__}", (mixin, base), names)


def _users_class(module):
    """The class that fuse() found `module` to be of. Parametrizing a fused module puts another class on top of what fuse() made."""
    return getattr(type(module), "_fastgan_base", type(module))


def _rebuild(mixin, base):
    cls = _fused_class(mixin, base)
    return cls.__new__(cls)


def _state(module):
    """What a copy or a pickle of `module` is made from, by its own __getstate__ where it has one."""
    return module.__getstate__() if hasattr(module, "__getstate__") else module.__dict__  # all objects have it since Python 3.11


class _Plans(list):
    """The traces of a module. Copies and pickles are empty: the module there is traced anew."""

    def find(self, module, arguments, keywords):
        """The one for these arguments and the state the module is in, or None."""
        return next((plan for plan in self if plan.takes(arguments, keywords) and plan.reads.hold(module)), None)

    def __reduce__(self):
        return _Plans, ()


class _Plan(NamedTuple):
    """How a traced module runs for one kind of arguments.

    Attributes:
        arguments, keywords: what it is called with, TENSOR for tensors.
        reads: what it holds for.
        run: function of the module and the tensors; None where nothing can be fused.
        chains: the children of each run of layers, as FusedModule._fastgan_run gets them.
        reasons: convolution by name -> why it is not fused, or what ended its run.
    """

    arguments: list
    keywords: dict
    reads: Reads
    run: object
    chains: list
    reasons: dict

    def takes(self, arguments, keywords):
        """Whether these are what it was traced for, also in their types: 1 == True == 1.0."""
        if self.arguments != arguments or self.keywords != keywords:
            return False
        return [*map(type, self.arguments)] == [*map(type, arguments)] and all(
            type(value) is type(keywords[name]) for name, value in self.keywords.items()
        )

    @staticmethod
    def of(module, arguments, keywords):
        base = _users_class(module)
        try:
            graph, reads = trace(module, base, arguments, keywords)
        except Untraceable as error:
            reason = f"forward of {base.__name__} cannot be traced: {error}"
            return _Plan(arguments, keywords, error.reads, None, [], {"": reason})
        chains, reasons = fuse_graph(module, graph)
        run = None
        if chains:
            code = graph.python_code("self")
            scope = dict(code.globals)
            exec(compile(code.src, f"{__file__}: trace of {base.__name__}", "exec"), scope)  # no file of the user's: see _extension._warn
            run = scope["forward"]
        return _Plan(arguments, keywords, reads, run, chains, reasons)


def _may_be_traced(module):
    """Whether `module` is of somebody's own class and has convolutions that no other such module has."""
    home = _users_class(module).__module__
    if home.startswith(("torch.", "fastgan.nn.")) or "forward" in module.__dict__:
        return False
    containers = [module]
    while containers:
        for child in containers.pop().children():
            if isinstance(child, CONVOLUTIONS):
                return True
            if type(child).__module__.startswith("torch.nn.") or isinstance(child, FusedSequential):
                containers.append(child)
    return False


def _plans(module):
    """The traces for a call with the required arguments, all tensors, in both modes."""
    arguments = _required_arguments(_users_class(module))
    mode, plans = module.training, _Plans()
    for training in (mode, not mode):
        module.__dict__["training"] = training  # of this module alone: its layers are not called
        try:
            if not any(plan.reads.hold(module) for plan in plans):
                plans.append(_Plan.of(module, arguments, {}))
        finally:
            module.__dict__["training"] = mode
    return plans


def _required_arguments(base):
    parameters = list(inspect.signature(base.forward).parameters.values())[1:]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [TENSOR for p in parameters if p.kind in positional and p.default is inspect.Parameter.empty]
    return required or [TENSOR]


def _fuse_by_trace(module, prefix, found):
    plans = _plans(module)
    if any(plan.run is not None for plan in plans) and not isinstance(module, FusedModule):
        module.__class__ = _fused_class(FusedModule, type(module))
        module.__dict__["_fastgan_plans"] = plans
    plan = next((plan for plan in plans if plan.reads.hold(module)), plans[0])
    if "" in plan.reasons:
        found[prefix] = plan.reasons[""]
    reasons = {prefix + name: reason for name, reason in plan.reasons.items()}
    found.update({name: Fusion(name, False, reason=reason) for name, reason in reasons.items() if name != prefix})
    for chain in plan.chains:
        children = [module.get_submodule(c) if isinstance(c, str) else Activation(*c) for c in chain]
        names = [prefix + c if isinstance(c, str) else c[0] for c in chain]
        _report_run(children, names, found, reasons)


def _report_sequential(sequential, prefix, found):
    children = list(sequential.named_children())
    _report_run([child for _, child in children], [prefix + name for name, _ in children], found, {})


def _report_run(children, names, found, reasons):
    """Adds what run_children would do with `children` now; `reasons` are why the run could not be longer."""
    position = 0
    while position < len(children):
        layer = match_layer(children, position)
        if layer is not None:
            end = position + layer.length
            parts = iter(names[position + 1 : end])
            found[names[position]] = Fusion(
                names[position], True, batch_norm=next(parts) if layer.bn is not None else None,
                activation=layer.describe_activation(),
                reason=_why_ended(children, names, end, layer) or reasons.get(names[position]),
            )
            position = end
        else:
            if isinstance(children[position], CONVOLUTIONS):
                found[names[position]] = Fusion(names[position], False, reason=_why_not(children[position]))
            position += 1


def _why_ended(children, names, end, layer):
    """Why the layer found so far does not go on with what follows, where that might have been expected."""
    if end < len(children) and layer.activation == "identity" and not isinstance(children[end], CONVOLUTIONS):
        child = children[end]
        kinds = (*BATCH_NORMS, *ACTIVATIONS)
        if isinstance(child, kinds) and not (layer.bn is not None and isinstance(child, BATCH_NORMS)):
            return f"not with {names[end]}: {_why_not(child) or 'its output is changed in place'}"
    return None


def _why_not(child):
    """Why a convolution, batch norm or activation cannot be part of a fused layer; None if it can."""
    if is_parametrized(child):
        return "it has a parametrization"
    kinds = (*CONVOLUTIONS, *BATCH_NORMS, *ACTIVATIONS)
    for cls in kinds:
        if isinstance(child, cls) and type(child) not in kinds:
            return f"{type(child).__name__} is a subclass of {cls.__name__}"
    if isinstance(child, CONVOLUTIONS) and child.padding_mode != "zeros":
        return f"its padding mode is {child.padding_mode!r}"
    if any(getattr(child, hooks, None) for hooks in HOOKS):
        return "it has a hook"
    if not is_plain(child):
        return "it has a forward of its own, or a hook is on all modules"
    return None


def _fusion(module, name, found):
    """What is known of the convolution `name`, in the end from the module that it belongs to."""
    if name in found:
        return found[name]
    conv = module.get_submodule(name)
    if reason := _why_not(conv):
        return Fusion(name, False, reason=reason)
    owner = name
    while owner:
        owner = owner.rpartition(".")[0]
        reason = found.get(f"{owner}." if owner else "")
        if reason is not None:
            return Fusion(name, False, reason=reason)
        if not type(module.get_submodule(owner)).__module__.startswith("torch.nn."):
            break
    owner = module.get_submodule(owner)
    own = "is an nn.Sequential with a forward of its own" if isinstance(owner, nn.Sequential) else None
    reason = f"{type(owner).__name__} {own}" if own else f"no call of it was seen in forward of {_users_class(owner).__name__}"
    return Fusion(name, False, reason=reason)
