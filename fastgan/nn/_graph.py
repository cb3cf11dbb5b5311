"""Runs of layers in the trace of a forward: each becomes one call."""

import torch
from torch import nn
from torch.nn import functional as F

from fastgan.nn._runs import ACTIVATIONS, BATCH_NORMS, CONVOLUTIONS
from fastgan.nn._trace import IN_PLACE

# The activations as functions and as methods of a tensor.
_FUNCTIONS = {
    F.relu: "relu", F.relu_: "relu", torch.relu: "relu", torch.relu_: "relu",
    F.leaky_relu: "leaky_relu", F.leaky_relu_: "leaky_relu",
    F.tanh: "tanh", torch.tanh: "tanh", torch.tanh_: "tanh",
    F.sigmoid: "sigmoid", torch.sigmoid: "sigmoid", torch.sigmoid_: "sigmoid",
}  # fmt: skip
_METHODS = {name + end: name for name in ("relu", "tanh", "sigmoid") for end in ("", "_")}


def fuse_graph(module, graph):
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
        if node in done or not isinstance(modules[node.target], CONVOLUTIONS):
            continue
        if not takes(node, CONVOLUTIONS):
            reasons[node.target] = "it is called with more than its input"
            continue
        nodes, children = [], []
        current, stage = node, 0  # what came last: 1 a convolution, 2 its batch norm, 3 its activation
        while current is not None:
            child = current.target
            if takes(current, CONVOLUTIONS):
                last, stage = child, 1
            elif stage == 1 and takes(current, BATCH_NORMS) and uses[id(modules[child])] == 1:
                stage = 2
            elif stage == 1 and is_leaky_relu(current) and any(map(changes_in_place, current.users)):
                reasons[last] = f"not with {_describe(current, modules, uses)}: its output is changed in place"
                break
            elif stage < 3 and takes(current, tuple(ACTIVATIONS)):
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
