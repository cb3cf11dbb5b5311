"""fuse(): makes the layers of somebody's networks run on the fused operators.

Two ways lead there. An nn.Sequential finds its runs of layers anew at every call. A module with a forward of its own is
traced (fastgan/nn/_trace.py), and runs the trace in which runs of layers have become one call each.
"""

import contextlib
import copy
import functools
import inspect
from typing import NamedTuple

import torch
from torch import nn
from torch._prims_common import suggest_memory_format
from torch.nn import functional as F
from torch.nn.modules import module as nn_module
from torch.nn.utils.parametrize import is_parametrized

from fastgan import _extension, ops
from fastgan.nn._trace import IN_PLACE, TENSOR, TRACING, Reads, Untraceable, kind, trace
from fastgan.nn.modules import BatchNormCall, GaussianNoise, conv_arguments, run_batch_norm_layer
from fastgan.nn.report import Fusion, FusionReport
from fastgan.nn.sync_batch_norm import SyncBatchNorm
from fastgan.ops._conv import activate
from fastgan.ops.conv_stack import StackCall, in_format
from fastgan.ops.linear_stack import LinearStackCall, linear_stack_gains

_ACTIVATIONS = {nn.ReLU: "relu", nn.LeakyReLU: "leaky_relu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid"}
_BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, SyncBatchNorm)
# The same as functions and as methods of a tensor.
_FUNCTIONS = {
    F.relu: "relu", F.relu_: "relu", torch.relu: "relu", torch.relu_: "relu",
    F.leaky_relu: "leaky_relu", F.leaky_relu_: "leaky_relu",
    F.tanh: "tanh", torch.tanh: "tanh", torch.tanh_: "tanh",
    F.sigmoid: "sigmoid", torch.sigmoid: "sigmoid", torch.sigmoid_: "sigmoid",
}  # fmt: skip
_METHODS = {name + end: name for name in ("relu", "tanh", "sigmoid") for end in ("", "_")}
_CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PERCEPTRON = {nn.Flatten, nn.Linear, nn.BatchNorm1d, GaussianNoise, *_ACTIVATIONS}  # children of a run with linear layers
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# The autocast dtypes in which a run of layers is one operator.
_STACK_AUTOCAST = {"cpu": (torch.bfloat16,), "cuda": (torch.bfloat16, torch.float16)}
_leaves_channels_last = False  # see images_in_channels_last()
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
                                 if isinstance(child, _CONVOLUTIONS)])


class FusedSequential:
    """What fuse() mixes into the class of an nn.Sequential."""

    def forward(self, input):
        return _run_children(list(self), input)

    def followed_by(self, module, input):
        """``module(self(input))``, with `module` as the last layer of this one's."""
        return _run_children([*self, module], input) if _plain(self) else module(self(input))

    def on_batches(self, module, parts, batches, tracked):
        """``module(self(torch.cat(parts)))`` as if it were called once for each of several batches, whose numbers of rows are `batches`:
        batch norm takes the statistics of each, and its running ones move by those of the first `tracked`. None, and nothing has
        happened, where this and `module` are not all one run of a perceptron's layers that gains by being one operator."""
        return _run_on_batches([*self, module], parts, batches, tracked) if _plain(self) else None

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
        return _run_children(
            [self.get_submodule(child) if isinstance(child, str) else _Activation(*child) for child in children], input
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


def _run_children(children, input):
    """Calls `children` one after the other, those that can be fused as one."""
    if _layer_by_layer():
        for child in children:
            input = child(input)
        return input
    position = 0
    while position < len(children):
        layers = []
        if _fusable_input(input):
            while (layer := _match(children, position)) is not None:
                layers.append(layer)
                position += layer.length
        if layers:
            input = _run(layers, input)
        elif (perceptron := _run_perceptron(children, position, input)) is not None:
            input, position = perceptron
        elif (norm := _match_norm(children, position, input)) is not None:
            input = norm.run(input)
            position += norm.length
        else:
            input = children[position](input)
            position += 1
    return input


def _layer_by_layer():
    """Whether PyTorch's own operators are wanted: what torch.jit and ONNX write is to run without fastgan, and
    torch.func's transforms have no rules for the fused ones."""
    return torch.jit.is_tracing() or torch.onnx.is_in_onnx_export() or _extension.transformed()


class _Activation(NamedTuple):
    """An activation that forward calls as a function."""

    name: str
    negative_slope: float = 0.2

    def __call__(self, input):
        return activate("fuse", input, self.name, self.negative_slope)


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
        chains, reasons = _fuse_graph(module, graph)
        run = None
        if chains:
            code = graph.python_code("self")
            scope = dict(code.globals)
            exec(compile(code.src, f"{__file__}: trace of {base.__name__}", "exec"), scope)  # no file of the user's: see leave_fast_path
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
            if isinstance(child, _CONVOLUTIONS):
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
        children = [module.get_submodule(c) if isinstance(c, str) else _Activation(*c) for c in chain]
        names = [prefix + c if isinstance(c, str) else c[0] for c in chain]
        _report_run(children, names, found, reasons)


def _report_sequential(sequential, prefix, found):
    children = list(sequential.named_children())
    _report_run([child for _, child in children], [prefix + name for name, _ in children], found, {})


def _report_run(children, names, found, reasons):
    """Adds what _run_children would do with `children` now; `reasons` are why the run could not be longer."""
    position = 0
    while position < len(children):
        layer = _match(children, position)
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
            if isinstance(children[position], _CONVOLUTIONS):
                found[names[position]] = Fusion(names[position], False, reason=_why_not(children[position]))
            position += 1


def _why_ended(children, names, end, layer):
    """Why the layer found so far does not go on with what follows, where that might have been expected."""
    if end < len(children) and layer.activation == "identity" and not isinstance(children[end], _CONVOLUTIONS):
        child = children[end]
        kinds = (*_BATCH_NORMS, *_ACTIVATIONS)
        if isinstance(child, kinds) and not (layer.bn is not None and isinstance(child, _BATCH_NORMS)):
            return f"not with {names[end]}: {_why_not(child) or 'its output is changed in place'}"
    return None


def _why_not(child):
    """Why a convolution, batch norm or activation cannot be part of a fused layer; None if it can."""
    if is_parametrized(child):
        return "it has a parametrization"
    kinds = (*_CONVOLUTIONS, *_BATCH_NORMS, *_ACTIVATIONS)
    for cls in kinds:
        if isinstance(child, cls) and type(child) not in kinds:
            return f"{type(child).__name__} is a subclass of {cls.__name__}"
    if isinstance(child, _CONVOLUTIONS) and child.padding_mode != "zeros":
        return f"its padding mode is {child.padding_mode!r}"
    if any(getattr(child, hooks, None) for hooks in _HOOKS):
        return "it has a hook"
    if not _plain(child):
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


class _Layer:
    """One convolution with what is fused to it: children[position : position + length]."""

    def __init__(self, conv, bn, activation):
        self.conv, self.bn = conv, bn
        self.length = 1 + (bn is not None) + (activation is not None)
        if activation is None:
            self.activation = "identity"
        else:
            self.activation = activation.name if type(activation) is _Activation else _ACTIVATIONS[type(activation)]
        self.negative_slope = activation.negative_slope if self.activation == "leaky_relu" else 0.2

    def describe_activation(self):
        if self.activation == "identity":
            return None
        return f"leaky_relu({self.negative_slope:g})" if self.activation == "leaky_relu" else self.activation

    def run(self, input):
        transposed = isinstance(self.conv, nn.ConvTranspose2d)  # whose class another thread may have changed: see _trace.py
        arguments = dict(conv_arguments(self.conv), activation=self.activation, negative_slope=self.negative_slope)
        if self.bn is None:
            operator = ops.conv_transpose2d_act if transposed else ops.conv2d_act
            return operator(input, self.conv.weight, self.conv.bias, **arguments)
        operator = ops.conv_transpose2d_bn_act if transposed else ops.conv2d_bn_act
        return run_batch_norm_layer(operator, input, self.conv, self.bn, arguments)


class _Norm:
    """A BatchNorm1d, or None, with the activation and the noise after it: children[position : position + length]."""

    def __init__(self, children, position):
        found, end = [], position
        for types in ((nn.BatchNorm1d,), _ACTIVATIONS, (GaussianNoise,)):
            child = children[end] if end < len(children) else None
            taken = type(child) in types and _plain(child)
            found.append(child if taken else None)
            end += taken
        self.bn, activation, self.noise = found
        self.length = end - position
        self.activation = "identity" if activation is None else _ACTIVATIONS[type(activation)]
        self.negative_slope = activation.negative_slope if self.activation == "leaky_relu" else 0.2

    @property
    def noise_std(self):
        return _noise_std(self.noise)

    def run(self, input):
        call = BatchNormCall(self.bn)
        running_mean, running_var = call.running or (None, None)
        output = ops.batch_norm_act_noise(
            input, self.bn.weight, self.bn.bias, running_mean, running_var, training=call.uses_batch,
            momentum=call.momentum, eps=self.bn.eps, activation=self.activation, negative_slope=self.negative_slope,
            noise_std=self.noise_std,
        )  # fmt: skip
        BatchNormCall.done(call)
        return output


def _noise_std(noise):
    return noise.std if noise is not None and noise.training else 0.0


def _run_perceptron(children, position, input):
    """Calls the run of a perceptron's layers that starts at children[position] as one operator. Returns its output and the position after
    it, or None where there is no such run, or the operator does not take it."""
    stack, end = _match_perceptron(children, position, input)
    return None if stack is None else (stack.run(), end)


def _match_perceptron(children, position, input, batches=(), tracked=1):
    """The run [GaussianNoise] (Linear [BatchNorm1d] [activation] [GaussianNoise])... that starts at children[position] as a
    LinearStackCall, and the position after it; (None, position) where there is none, or it gains nothing."""
    nothing, first = (None, position), children[position]
    noise = first if type(first) is GaussianNoise and _plain(first) else None
    position += noise is not None
    if not (position < len(children) and type(children[position]) is nn.Linear and _fusable_rows(input)):
        return nothing
    if input.dim() != 2 or input.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return nothing
    if isinstance(input.shape[0], torch.SymInt) and torch.compiler.is_exporting():
        return nothing  # what gains goes by the rows, which an exported program is to leave open
    left = children[position:]
    kinds = [type(child) for child in left]
    # With a bias and batch norm's two numbers a feature, what all that is left would have as one run.
    most = sum([(child.in_features + 3) * child.out_features for child, kind in zip(left, kinds) if kind is nn.Linear])
    if not linear_stack_gains(max(batches) if batches else input.shape[0], most, nn.BatchNorm1d in kinds):
        return nothing
    stack, calls = LinearStackCall(input, _noise_std(noise), batches, tracked), []
    while position < len(children) and type(linear := children[position]) is nn.Linear and _plain(linear):
        norm = _Norm(children, position + 1)
        uses_batch, running, counter, momentum = False, (), None, 0.0
        if norm.bn is not None:
            call = BatchNormCall(norm.bn)
            uses_batch, running, counter, momentum = call.uses_batch, call.running, call.counter, call.momentum
            if any(call.running and other.running and call.running[0] is other.running[0] for other in calls):
                break  # a shared batch norm: what it is updated to comes first
            if tracked > 1 and norm.bn.momentum is None:
                break  # another momentum for each batch
        if not stack.add(
            linear, norm.bn, uses_batch, running, counter, momentum, norm.activation, norm.negative_slope, norm.noise_std
        ):
            break
        if norm.bn is not None:
            calls.append(call)
        position += 1 + norm.length
    return (stack, position) if stack.gains else nothing


def _run_on_batches(children, parts, batches, tracked):
    """FusedSequential.on_batches for a list of modules."""
    if not all(type(child) in _PERCEPTRON for child in children) or _layer_by_layer():
        return None
    input, position = torch.cat(parts), 0
    if type(children[0]) is nn.Flatten and children[0].start_dim == 1 and _plain(children[0]):
        input, position = input.flatten(1, children[0].end_dim), 1
    stack, end = _match_perceptron(children, position, input, batches, tracked)
    return stack.run() if stack is not None and end == len(children) else None


@contextlib.contextmanager
def images_in_channels_last():
    """Inside, what leaves a fused run of layers is in channels_last, as it is between them, for a network that takes it so."""
    global _leaves_channels_last
    before, _leaves_channels_last = _leaves_channels_last, True
    try:
        yield
    finally:
        _leaves_channels_last = before


def _run(layers, input):
    """A run of fused layers. What leaves has the memory format that the plain layers would have given it, and so has the gradient of
    what comes in."""
    keeps_channels_last = (
        _leaves_channels_last
        or _is_channels_last(input)
        or any(_is_channels_last(layer.conv.weight) for layer in layers)
    )
    output = _run_stack(layers, input)
    if output is None:
        # Between themselves the layers work in channels_last on the CPU, where ATen's convolutions are faster.
        output = in_format(input, torch.channels_last) if input.is_cpu else input
        for layer in layers:
            output = layer.run(output)
        if not input.is_cpu:
            return output
    if keeps_channels_last:
        return output
    if not output.is_contiguous():
        output = in_format(output, torch.contiguous_format)
    if output.shape[1] == 1 and output.stride(1) == 1:
        # The bytes are the same in both formats, and only the strides tell the next layer which one it is.
        output = output.flatten().view(output.shape)
    return output


def _run_stack(layers, input):
    """The whole run as one operator, or None where it does not take these layers or gains nothing."""
    device, dtype = input.device.type, input.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        # Images in the autocast dtype, parameters as they are: the loops round weights where they read them.
        dtype = torch.get_autocast_dtype(device)
        if dtype not in _STACK_AUTOCAST[device]:
            return None
    elif dtype != torch.float32 or device == "cuda":  # there cuDNN's loops are faster in float32
        return None
    stack = StackCall(input, dtype)
    calls = []
    for layer in layers:
        uses_batch, running, momentum, group = False, (), 0.0, None
        if layer.bn is not None:
            call = BatchNormCall(layer.bn)
            uses_batch, running, momentum, group = call.uses_batch, call.running, call.momentum, call.process_group
            if any(call.running and other.running and call.running[0] is other.running[0] for other in calls):
                return None  # a shared batch norm, updated more than once
            calls.append(call)
        if not stack.add(
            layer.conv, layer.bn, uses_batch, running, momentum, layer.activation, layer.negative_slope, group
        ):
            return None
    if not stack.gains:
        return None
    output = stack.run()
    BatchNormCall.done(*calls)
    return output


def _is_channels_last(tensor):
    """By PyTorch's rule for tensors that are in both formats, because of sizes of 1: it goes by their strides."""
    if not tensor.is_contiguous(memory_format=torch.channels_last):
        return False
    return not tensor.is_contiguous() or suggest_memory_format(tensor) == torch.channels_last


def _fusable_input(input):
    return (
        isinstance(input, torch.Tensor)
        and input.dim() == 4
        and input.dtype in _DTYPES
        and input.layout == torch.strided
        and _extension.runs_on(input.device)
    )


def _match(children, position):
    """The fusable layer that starts at children[position], or None."""
    if position >= len(children):
        return None
    conv = children[position]
    if type(conv) not in _CONVOLUTIONS or conv.padding_mode != "zeros" or not _plain(conv):
        return None
    bn = activation = None
    position += 1
    if position < len(children) and type(children[position]) in _BATCH_NORMS and _plain(children[position]):
        bn = children[position]
        position += 1
    if position < len(children):
        child = children[position]
        if type(child) is _Activation or type(child) in _ACTIVATIONS and _plain(child):
            activation = child
    if bn is None and type(activation) is nn.LeakyReLU and _changed_in_place(children, position):
        activation = None
    return _Layer(conv, bn, activation)


def _changed_in_place(children, position):
    """Whether the output of children[position] is overwritten by the child behind it. PyTorch takes the derivative of LeakyReLU from
    its input; the operators, behind a convolution alone, from the output, which then has to stay. Other activations need theirs anyway."""
    return position + 1 < len(children) and getattr(children[position + 1], "inplace", False) is True


def _match_norm(children, position, input):
    """The run of batch norm, activation and noise that starts at children[position], or None."""
    if type(children[position]) is not nn.BatchNorm1d or not _plain(children[position]) or not _fusable_rows(input):
        return None
    return _Norm(children, position)


def _fusable_rows(input):
    return (
        isinstance(input, torch.Tensor)
        and input.is_cpu
        and input.dim() in (2, 3)
        and input.dtype in _DTYPES
        and input.layout == torch.strided
        and _extension.has_kernels("cpu")
    )


def _plain(child):
    """Whether calling `child` does nothing but its own class's forward."""
    state = child.__dict__
    if any(map(state.get, _HOOKS)) or "forward" in state:
        return False
    return not (
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    )


def _fuse_graph(module, graph):
    """Puts a call of _fastgan_run in the place of every run of layers in `graph`.

    Returns:
        (the children of every run, {convolution: why it is not fused or its run ends}).
    """
    modules = dict(module.named_modules())
    calls = [node for node in graph.nodes if node.op == "call_module"]
    uses = {}
    for node in calls:
        uses[id(modules[node.target])] = uses.get(id(modules[node.target]), 0) + 1
    chains, reasons, done = [], {}, set()

    def takes(node, cls):
        alone = len(node.args) == 1 and not node.kwargs
        return node.op == "call_module" and isinstance(modules[node.target], cls) and alone

    def next_node(node):
        """The only user of node, if all it does with it is to take it as its first argument."""
        user = next(iter(node.users), None)
        single = len(node.users) == 1 and user.args[:1] == (node,) and len(user.all_input_nodes) == 1
        return user if single else None

    def is_leaky_relu(node):
        if node.op == "call_module":
            return isinstance(modules[node.target], nn.LeakyReLU)
        return (_functional_activation(node) or ("",))[0] == "leaky_relu"

    def changes_in_place(node):
        """See _changed_in_place."""
        if node.op == "call_module":
            return getattr(modules[node.target], "inplace", False) is True
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        written = name.endswith("_") and not name.endswith("__")
        return written or node.kwargs.get("inplace") is True or node.target in IN_PLACE.values()

    for node in calls:
        if node in done or not isinstance(modules[node.target], _CONVOLUTIONS):
            continue
        if not takes(node, _CONVOLUTIONS):
            reasons[node.target] = "it is called with more than its input"
            continue
        nodes, children = [], []
        current, stage = node, 0  # what came last: 1 a convolution, 2 its batch norm, 3 its activation
        while current is not None:
            child = current.target
            if takes(current, _CONVOLUTIONS):
                last, stage = child, 1
            elif stage == 1 and takes(current, _BATCH_NORMS) and uses[id(modules[child])] == 1:
                stage = 2
            elif stage == 1 and is_leaky_relu(current) and any(map(changes_in_place, current.users)):
                reasons[last] = f"not with {_describe(current, modules, uses)}: its output is changed in place"
                break
            elif stage < 3 and takes(current, tuple(_ACTIVATIONS)):
                stage = 3
            elif stage < 3 and (activation := _functional_activation(current)):
                child, stage = activation, 3
            else:
                if stage < 3 and current.op != "output":
                    reasons[last] = f"followed by {_describe(current, modules, uses)}"
                break
            nodes.append(current)
            children.append(child)
            if stage < 3 and len(current.users) > 1:
                reasons[last] = f"its output is used {len(current.users)} times"
            current = next_node(current)
        done.update(nodes)
        chains.append(children)
        with graph.inserting_before(node):
            # Where the first layer ran: what happens in between cannot change its input then.
            call = graph.create_node("call_module", "_fastgan_run", (node.args[0], *children))
        nodes[-1].replace_all_uses_with(call)
        for old in reversed(nodes):
            graph.erase_node(old)
    return chains, reasons


def _functional_activation(node):
    """(name, negative slope) of a node that applies an activation as a function or a method; None for others."""
    if node.op == "call_function" and node.target in _FUNCTIONS:
        name = _FUNCTIONS[node.target]
    elif node.op == "call_method" and node.target in _METHODS:
        name = _METHODS[node.target]
    else:
        return None
    if name != "leaky_relu":
        return (name,)
    slope = node.args[1] if len(node.args) > 1 else node.kwargs.get("negative_slope", 0.01)
    return (name, float(slope))


def _describe(node, modules, uses):
    if node.op != "call_module":
        return getattr(node.target, "__name__", str(node.target))
    shared = ", shared" if uses[id(modules[node.target])] > 1 else ""
    return f"{node.target} ({type(modules[node.target]).__name__}{shared})"
