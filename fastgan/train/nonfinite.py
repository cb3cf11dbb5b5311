"""Finding the layer in which a run went wrong."""

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


def _first_nonfinite_layer(network: nn.Module, batch: Tensor) -> str | None:
    for name, parameter in network.named_parameters():
        if not parameter.isfinite().all():
            layer, _, kind = name.rpartition(".")
            return f"layer {layer} ({kind} of {type(network.get_submodule(layer)).__name__})"
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
