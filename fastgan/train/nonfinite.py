"""Finding the layer in which a run went wrong."""

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def locate_nonfinite(generator: nn.Module, discriminator: nn.Module, images: Tensor, z: Tensor) -> str:
    """Where the first value that is not finite arises, in the order in which the values are computed."""
    if not images.isfinite().all():
        return "the training images"
    layer = _first_nonfinite_layer(generator, z)
    if layer:
        return f"generator, {layer}"
    for name, batch in (("real images", images), ("fakes", generator(z))):
        layer = _first_nonfinite_layer(discriminator, batch)
        if layer:
            return f"discriminator on {name}, {layer}"
    return "the loss itself"


def nonfinite_weight(network: nn.Module) -> str | None:
    """The layer and the name of the first parameter, or else the first running statistic, that is not finite; None where all are."""
    # Another buffer may hold infinity for good, as a mask does.
    statistics = (pair for pair in network.named_buffers() if pair[0].endswith(("running_mean", "running_var")))
    return _first_nonfinite(network, itertools.chain(network.named_parameters(), statistics))


def _first_nonfinite(network: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    for name, tensor in tensors:
        if not tensor.isfinite().all():
            layer, _, kind = name.rpartition(".")
            return f"layer {layer} ({kind} of {type(network.get_submodule(layer)).__name__})"
    return None


def _first_nonfinite_layer(network: nn.Module, batch: Tensor) -> str | None:
    if weight := _first_nonfinite(network, network.named_parameters()):
        return weight
    found: list[str] = []

    def hook(name: str, module: nn.Module, output: Any) -> None:
        if not found and isinstance(output, Tensor) and not output.isfinite().all():
            found.append(f"layer {name} (output of {type(module).__name__})")

    handles = [
        module.register_forward_hook(lambda module, _, output, name=name: hook(name, module, output))
        for name, module in network.named_modules()
        if not any(module.children())
    ]
    network(batch)
    for handle in handles:
        handle.remove()
    return found[0] if found else None
