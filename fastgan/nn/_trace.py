"""Tracing of somebody's forward by torch.fx, for fuse(): what the trace took for granted is kept with it, and what a
trace would lose is refused.

torch.fx runs forward once, on stand-ins for the tensors, and notes what is done to them. Everything else that forward
does happens then and never again. So this records the attributes that forward reads of its module (`self.training`,
`self.alpha`) and the names of the children of the modules that it looks into, to be compared at every call, and refuses
a forward that sets attributes, prints, draws numbers, makes tensors of its own or enters a context such as no_grad.
"""

import abc
import copy
import functools
import gc
import operator
import os
import pickle
import random
import sys
import threading
import types
import typing

import torch
from torch import fx, nn

from fastgan import _arguments

_TORCH = os.path.join(os.path.dirname(torch.__file__), "")  # with the separator: torchvision lies beside it
_FX = os.path.join(os.path.dirname(fx.__file__), "")
_SIMPLE = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.memory_format)
# Modules whose functions answer differently from call to call, and builtin functions that act on the world.
_CHANGING = ("time", "datetime", "secrets")
_ACTING = ("print", "input", "open", "setattr", "delattr", "exec")
# Attributes of a tensor that forward may look at by `is`.
_METADATA = ("dtype", "device", "layout", "requires_grad", "is_leaf", "grad", "grad_fn")
# What forward may ask PyTorch outside of any tensor, and would be told differently another time.
_STATES = (
    "is_grad_enabled", "is_autocast_enabled", "is_inference_mode_enabled", "is_autocast_cpu_enabled", "manual_seed",
)
_CHECKPOINT = os.path.join(_TORCH, "utils", "checkpoint.py")
# Held while a module is traced: torch.fx replaces methods of nn.Module then, which two traces would not put back in order.
TRACING = threading.RLock()
_tracing_thread = None


class Untraceable(Exception):
    """A forward that must not be replaced by its trace; the message says why, as the end of a sentence.

    Attributes:
        reads: what forward had read until then.
    """

    def __init__(self, message, reads=None):
        super().__init__(message)
        self.reads = reads


class Reads(dict):
    """What a trace took for granted: attribute of the module by path -> its value (a copy) while tracing, Untraceable for one that
    was missing.

    Attributes:
        children: path of a module that forward looked into -> its children, as _children() gives them.
        aliases: lists of paths that led to the same layer, parameter or buffer, which the trace knows by the first of them.
    """

    def __init__(self):
        super().__init__()
        self.children, self.aliases = {}, []

    def note_aliases(self, module, graph):
        """Finds the aliases of what `graph`, the trace of `module`, takes from it."""
        targets = {node.target for node in graph.nodes if node.op in ("call_module", "get_attr")}
        paths = {}
        for members in (module.named_modules, module.named_parameters, module.named_buffers):
            for path, member in members(remove_duplicate=False):
                paths.setdefault(id(member), []).append(path)
        self.aliases = [names for names in paths.values() if len(names) > 1 and not targets.isdisjoint(names)]

    def hold(self, module):
        """Whether `module` still is as it was when traced."""
        try:
            return self._hold(module)
        except AttributeError:  # one of the paths leads nowhere any more
            return False

    def _hold(self, module):
        for path, children in self.children.items():
            if _children(module.get_submodule(path)) != children:
                return False
        for path, *others in self.aliases:
            if any(self._now(module, other) is not self._now(module, path) for other in others):
                return False
        for path, value in self.items():
            now = self._now(module, path)
            if not (now is value or (type(now) is type(value) and not callable(value) and now == value)):
                return False
        return True

    def changed_contents(self, module):
        """The lists, dicts and sets that forward itself changed."""
        collections = [path for path, value in self.items() if isinstance(value, (list, dict, set))]
        return [path for path in collections if not _comparable(now := self._now(module, path)) or now != self[path]]

    def restore_contents(self, module):
        for path in self.changed_contents(module):
            now, before = self._now(module, path), self[path]
            now.clear()
            now.extend(before) if isinstance(now, list) else now.update(before)

    @staticmethod
    def _now(module, path):
        owner, _, name = path.rpartition(".")
        return getattr(module.get_submodule(owner), name, Untraceable)


def trace(module, base, arguments, keywords):
    """Traces `base.forward` on `module`, an instance of it.

    Args:
        arguments: positional arguments, TENSOR where a tensor will come.
        keywords: keyword arguments likewise.

    Returns:
        (torch.fx.Graph whose placeholders are the tensor arguments in their order, Reads).

    Raises:
        Untraceable: with its reads.
    """
    global _tracing_thread
    with TRACING:
        _tracing_thread = threading.get_ident()
        return _trace(module, base, arguments, keywords)


def _trace(module, base, arguments, keywords):
    count = sum(value is TENSOR for value in (*arguments, *keywords.values()))
    reads, tracer = Reads(), _Tracer()

    def forward(self, *tensors):
        tensors = iter(tensors)
        values = [next(tensors) if value is TENSOR else value for value in arguments]
        named = {name: next(tensors) if value is TENSOR else value for name, value in keywords.items()}
        with _watched(tracer.found):
            return base.forward(self, *values, **named)

    # torch.fx counts the arguments in the signature.
    names = "".join(f", input_{i}" for i in range(count))
    scope = {"forward": forward}
    exec(f"def traced(self{names}): return forward(self{names})", scope)
    classes = [(child, child.__class__) for child in module.modules()]
    numbers = _random_states()
    try:
        for name, child in module.named_modules():
            child.__dict__["_fastgan_reads"] = (reads, f"{name}." if name else "")
            child.__class__ = type(type(child).__name__, (_Recorder, type(child)), {})
        module.__class__._fastgan_traced = scope["traced"]
        graph = tracer.trace(module)
        for attribute in tracer.asked:
            if not attribute.node.users:
                raise Untraceable(f"it looks at the {attribute.attr} of a tensor, which a trace does not know")
        reads.note_aliases(module, graph)
        if changed := reads.changed_contents(module):
            raise Untraceable(f"it changes the contents of self.{changed[0]}")
        if pickle.dumps(_random_states()) != pickle.dumps(numbers):
            raise Untraceable("it draws random numbers, which a trace would keep")
    except Exception as error:  # whatever a forward raises when it gets stand-ins for tensors
        message = str(error).strip() or type(error).__name__
        if not isinstance(error, Untraceable):
            message = f"{type(error).__name__}: {message.splitlines()[0]}"
        raise Untraceable(message, reads) from error
    finally:
        _restore_random_states(*numbers)
        for child, before in classes:
            child.__class__ = before
            child.__dict__.pop("_fastgan_reads", None)
        reads.restore_contents(module)
    return graph, reads


def _random_states():
    numpy = sys.modules.get("numpy")
    return random.getstate(), bytes(torch.get_rng_state()), numpy and numpy.random.get_state(legacy=False)


def _restore_random_states(python, cpu, numpy):
    random.setstate(python)
    torch.set_rng_state(torch.frombuffer(bytearray(cpu), dtype=torch.uint8))
    if numpy is not None:
        sys.modules["numpy"].random.set_state(numpy)


class _Tensor:
    def __repr__(self):
        return "TENSOR"


TENSOR = _Tensor()


def kind(value):
    """What of an argument a trace depends on: TENSOR, the value itself, or Untraceable if it cannot be compared."""
    if isinstance(value, torch.Tensor):
        return TENSOR
    return value if isinstance(value, _SIMPLE) else Untraceable


def _in_place(name):
    """``operator.iadd`` and its like as a function of its own: torch.fx would write ``a += b``, by which `a` would stand for the
    sum where it is a number, such as a size, that forward also keeps."""
    operation = getattr(operator, name)

    def change(value, other):
        return operation(value, other)

    change.__name__ = name
    return change


class _StandIn:
    """Mixed into torch.fx's stand-ins: what theirs do otherwise than a tensor."""

    def __getattr__(self, name):
        attribute = _Attribute(self, name)
        if name in _METADATA:
            self.tracer.asked.append(attribute)
        return attribute

    def __hash__(self):
        if _is_users(sys._getframe(1)):
            _refuse(self, "hash")
        return super().__hash__()

    def __repr__(self):
        if _is_users(sys._getframe(1)):
            _refuse(self, "str or repr")
        return super().__repr__()

    def __setattr__(self, name, value):
        if _is_users(sys._getframe(1)):
            raise Untraceable(f"it sets the attribute {name} of a tensor")
        super().__setattr__(name, value)


def _changing(function):
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


_OPERATORS = ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
IN_PLACE = {f"__i{name}__": _in_place(f"i{name}") for name in _OPERATORS}
for _name, _function in IN_PLACE.items():
    setattr(_StandIn, _name, _changing(_function))


class _Proxy(_StandIn, fx.Proxy):
    pass


class _Attribute(_StandIn, fx.proxy.Attribute):
    pass


class _Tracer(fx.Tracer):
    """
    Attributes:
        found: what forward did that a trace would lose.
        asked: the stand-ins for a tensor's dtype, device, ...

    The calls that other threads make meanwhile, of any module, pass straight through.
    """

    proxy_buffer_attributes = True
    traced_func_name = "_fastgan_traced"  # so that forward is what it was, for other threads

    def __init__(self):
        super().__init__()
        self.found, self.asked = [], []

    def proxy(self, node):
        return _Proxy(node, self)

    def is_leaf_module(self, module, name):
        return True

    def call_module(self, module, forward, args, kwargs):
        if threading.get_ident() != _tracing_thread:
            return forward(*args, **kwargs)
        return super().call_module(module, forward, args, kwargs)

    def getattr(self, name, value, parameter_proxy_cache):
        if threading.get_ident() != _tracing_thread:
            return value
        return super().getattr(name, value, parameter_proxy_cache)

    def create_arg(self, value):
        if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
            attributes = {id(tensor) for tensor in (*self.root.buffers(), *self.tensor_attrs)}
            if id(value) not in attributes:
                raise Untraceable("it makes a tensor of its own, which a trace would keep for ever")
        return super().create_arg(value)


def _children(module):
    """The names of a module's children, and which of them are None."""
    children = module._modules
    return [*children], [child is None for child in children.values()]


class _Recorder:
    """Mixed into a module's class while it is traced: notes the attributes its own code reads, and the children it sees.
    Other threads, which may call the module meanwhile, notice nothing."""

    def __getattribute__(self, name):
        value = super().__getattribute__(name)
        if threading.get_ident() != _tracing_thread:
            return value
        if name == "_modules":  # loops over a container, named_children(), ...
            if _is_for_user(sys._getframe(1)):
                self._fastgan_note_children()
            return value
        if name in ("_parameters", "_buffers"):  # parameters(), state_dict(), ...
            if _is_for_user(sys._getframe(1)):
                raise Untraceable(f"it looks through the {name[1:]} of a module")
            return value
        if name.startswith("__") or not _is_users(sys._getframe(1)):
            return value
        if isinstance(value, (nn.Module, torch.Tensor, fx.Proxy)):
            return value  # looked up anew at every call
        state = object.__getattribute__(self, "__dict__")
        if isinstance(value, types.MethodType) and name not in state:
            return value
        reads, path = state["_fastgan_reads"]
        if path + name not in reads:
            if not (_comparable(value) or _is_function(value)):
                raise Untraceable(f"it reads self.{path}{name} ({type(value).__name__}), whose contents may change")
            reads[path + name] = value if callable(value) else copy.deepcopy(value)
        return value

    def __getattr__(self, name):  # of children, parameters and buffers
        if threading.get_ident() != _tracing_thread:
            return super().__getattr__(name)
        self._fastgan_note_children()
        reads, path = self.__dict__["_fastgan_reads"]
        users = _is_users(sys._getframe(1))
        try:
            value = super().__getattr__(name)
        except AttributeError:
            if users:
                reads[path + name] = Untraceable  # as Reads takes a missing one
            raise
        if users and value is None:
            reads[path + name] = None
        return value

    def _fastgan_note_children(self):
        reads, path = self.__dict__["_fastgan_reads"]
        reads.children.setdefault(path.removesuffix("."), _children(self))

    def __setattr__(self, name, value):
        if threading.get_ident() == _tracing_thread and _is_for_user(sys._getframe(1)):  # also self.eval()
            path = object.__getattribute__(self, "__dict__")["_fastgan_reads"][1]
            raise Untraceable(f"it sets self.{path}{name}")
        super().__setattr__(name, value)


def _comparable(value):
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_comparable, value))
    if isinstance(value, dict):
        return all(_comparable(part) for item in value.items() for part in item)
    return isinstance(value, _SIMPLE)


def _is_function(value):
    """Whether calling `value` does the same as long as it is the same object, but for what is recorded by itself."""
    if isinstance(value, functools.partial):
        return _is_function(value.func) and _comparable(value.args) and _comparable(value.keywords)
    if isinstance(value, (types.MethodType, types.BuiltinMethodType)):
        owner = value.__self__
        return owner is None or isinstance(owner, (types.ModuleType, type, _Recorder))
    return isinstance(value, (types.FunctionType, types.MethodDescriptorType, type))


@functools.cache
def _is_users_file(name):
    return not name.startswith(_TORCH) and name not in (__file__, _arguments.__file__)


def _is_users(frame):
    if frame.f_code in (_hasattr.__code__, _getattr.__code__, _len.__code__):  # called in place of the builtins
        frame = frame.f_back
    return _is_users_file(frame.f_code.co_filename)


def _is_for_user(frame):
    """Whether torch.nn's code runs for forward's, and not for torch.fx or for this module."""
    while frame is not None and not _is_users(frame):
        if frame.f_code.co_filename == __file__ or frame.f_code.co_filename.startswith(_FX):
            return False
        frame = frame.f_back
    return frame is not None


def _asks(value):
    """Whether `value` is a stand-in, and the caller's caller forward's own code."""
    if not isinstance(value, fx.Proxy):
        return False
    frame = sys._getframe(2)
    return _is_users(frame.f_back if frame.f_code is torch.is_tensor.__code__ else frame)


def _is_tensor(value):
    """Whether what a stand-in stands for is a tensor without doubt: an argument or a buffer. A result may be a tuple or a size."""
    return type(value) is _Proxy and value.node.op in ("placeholder", "get_attr")


def _refuse(value, question):
    message = f"it calls {question}, whose answer a trace cannot know"
    value.tracer.found.append(message)  # forward may catch the error
    raise Untraceable(message)


def _isinstance(value, classes):
    if not _asks(value):
        return isinstance(value, classes)
    if _is_tensor(value):
        if issubclass(torch.Tensor, classes):
            return True
        if not any(map(_holds_for_some_tensors, _flat(classes))):
            return False
    _refuse(value, "isinstance" if _is_tensor(value) else "isinstance of a result")


def _flat(classes):
    if isinstance(classes, tuple):
        return [cls for part in classes for cls in _flat(part)]
    return typing.get_args(classes) or [classes]  # of a | b


def _holds_for_some_tensors(cls):
    if type(cls).__instancecheck__ not in (type.__instancecheck__, abc.ABCMeta.__instancecheck__):
        return True  # goes by more than the class: nn.Parameter, torch.FloatTensor
    return issubclass(cls, torch.Tensor)


def _hasattr(value, name):
    if not _asks(value):
        return hasattr(value, name)
    if _is_tensor(value) and _is_tensors_attribute(name):
        return True
    _refuse(value, f"hasattr(..., {name!r})")


def _getattr(value, name, *default):
    if default and _asks(value) and not (_is_tensor(value) and _is_tensors_attribute(name)):
        _refuse(value, f"getattr(..., {name!r}, ...)")
    return getattr(value, name, *default)


def _is_tensors_attribute(name):
    return any(name in vars(cls) for cls in torch.Tensor.__mro__)


def _len(value):
    return value.tracer.create_proxy("call_function", len, (value,), {}) if _asks(value) else len(value)


def _callable(value):
    if not _asks(value):
        return callable(value)
    return False if _is_tensor(value) else _refuse(value, "callable")


class _TypeOfType(type):
    def __call__(cls, *arguments, **keywords):
        if len(arguments) == 1 and _asks(arguments[0]):
            _refuse(arguments[0], "type")  # an argument's may be a subclass of torch.Tensor
        if len(arguments) == 1 and isinstance(arguments[0], _Recorder):
            return type(arguments[0]).__bases__[1]
        return type(*arguments, **keywords)

    def __instancecheck__(cls, value):
        return isinstance(value, type)

    def __subclasscheck__(cls, other):
        return issubclass(other, type)


class _Type(metaclass=_TypeOfType):
    pass


# Builtins that a stand-in for a tensor would answer differently from a tensor, and what forward calls in their place.
_ANSWERS = {"len": _len, "isinstance": _isinstance, "hasattr": _hasattr, "getattr": _getattr, "callable": _callable, "type": _Type}


def _has_generator(frame):
    """Whether an argument, a variable around it or a global name of a function about to run is a generator of random numbers. The
    global generators' states are compared instead; the calls of numpy's cannot be seen."""
    numpy = sys.modules.get("numpy.random")
    kinds = (random.Random, torch.Generator) + ((numpy.Generator, numpy.RandomState) if numpy else ())
    names = [frame.f_globals.get(name) for name in frame.f_code.co_names]
    return any(isinstance(value, kinds) for value in (*names, *frame.f_locals.values()))


class _watched:
    """While forward runs: raises Untraceable where its own code does what a trace would lose, and answers what it asks about stand-ins.

    Args:
        found: list for what it does.
    """

    def __init__(self, found):
        self.found = found

    def __enter__(self):
        self.before, self.answers, self.imports = sys.getprofile(), [], 0
        # What runs when garbage is collected is not forward's doing (Hypothesis reads the time then).
        self.collects = gc.isenabled()
        gc.disable()
        sys.setprofile(self.see)

    def see(self, frame, event, function):
        if event == "c_call":
            if not _is_users(frame):
                return
            name, home = function.__name__, function.__module__ or type(getattr(function, "__self__", None)).__module__
            if name in _ACTING and home == "builtins":
                self.found.append(f"it calls {name}")
            elif name in _STATES:
                self.found.append(f"it calls {name}, whose answer may change")
            elif home in _CHANGING:
                self.found.append(f"it calls {home}.{name}, whose answer changes")
            elif isinstance(getattr(function, "__self__", None), random.Random):
                self.found.append("it draws random numbers, which a trace would keep")
        elif event == "return":
            if frame.f_code.co_name == "<module>":
                self.imports -= 1
                if not self.imports:
                    self.give_answers()
        elif event == "call":
            if frame.f_code.co_name == "<module>":
                if not self.imports:
                    self.take_answers()  # what the module takes from here would stay, and typing makes classes by type
                self.imports += 1
            if _is_users_file(frame.f_code.co_filename) or frame.f_code is torch.is_tensor.__code__:
                self.answer(frame)
                if _has_generator(frame):
                    self.found.append("it has a random number generator at hand, whose numbers a trace would keep")
            home, name = frame.f_globals.get("__name__", ""), frame.f_code.co_name
            if frame.f_code.co_filename == _CHECKPOINT:
                self.found.insert(0, "it calls torch.utils.checkpoint, which a trace would undo")  # before contexts of its own
            if name == "__enter__" and home in ("torch.autograd.grad_mode", "torch.amp.autocast_mode"):
                self.found.append(f"it enters a context ({home.rpartition('.')[2]}), which a trace loses")
            elif frame.f_back is None or not _is_users(frame.f_back):
                return
            elif name == "__enter__":
                self.found.append(f"it enters a context of {home}, which a trace loses")
            elif name in _STATES:
                self.found.append(f"it calls {name}, whose answer may change")
            elif home in _CHANGING:
                self.found.append(f"it calls {home}.{name}, whose answer changes")

    def answer(self, frame):
        """Gives a function about to run its builtins from _ANSWERS, by the global names it looks them up by."""
        if self.imports:
            return
        scope = frame.f_globals
        for name in _ANSWERS.keys() & frame.f_code.co_names:
            if name not in scope:
                scope[name] = _ANSWERS[name]
                self.answers.append((scope, name))

    def give_answers(self):
        for scope, name in self.answers:
            scope[name] = _ANSWERS[name]

    def take_answers(self):
        for scope, name in self.answers:
            del scope[name]

    def __exit__(self, kind, error, traceback):
        if self.before is None or callable(self.before):
            sys.setprofile(self.before)
        else:  # a profiler in C, cProfile's or PyTorch's
            sys.setprofile(None)
            getattr(self.before, "enable", bool)()
        self.take_answers()
        if self.collects:
            gc.enable()
        if self.found and not isinstance(error, Untraceable):
            raise Untraceable(self.found[0]) from error
