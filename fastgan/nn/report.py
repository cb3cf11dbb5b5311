"""What fuse() did with each convolution of a module."""

from typing import NamedTuple


class Fusion(NamedTuple):
    """What became of one convolution.

    Attributes:
        name: its path in the module.
        fused: whether it runs on a fused operator.
        batch_norm: path of the batch norm that runs with it, or None.
        activation: the activation that runs with it, such as ``"relu"`` or ``"leaky_relu(0.2)"``, or None.
        reason: why it is not fused, or not with what follows it; None where there is nothing to say.
    """

    name: str
    fused: bool
    batch_norm: str | None = None
    activation: str | None = None
    reason: str | None = None

    def __str__(self) -> str:
        if not self.fused:
            return f"as it was: {self.reason}"
        parts = [part for part in (self.batch_norm, self.activation) if part]
        text = f"fused with {' and '.join(parts)}" if parts else "fused, alone"
        return f"{text} ({self.reason})" if self.reason else text


class FusionReport:
    """The convolutions of a module as :func:`fastgan.fuse` left them; ``print`` it.

    Args:
        layers: a :class:`Fusion` for each, in the order of ``named_modules``; an attribute too.
    """

    def __init__(self, layers: list[Fusion]):
        self.layers = layers

    @property
    def fused(self) -> int:
        """How many are fused."""
        return sum(layer.fused for layer in self.layers)

    def __str__(self) -> str:
        width = max((len(layer.name) for layer in self.layers), default=0)
        lines = [f"{self.fused} of {len(self.layers)} convolutions fused"]
        return "\n".join(lines + [f"  {layer.name:<{width}}  {layer}" for layer in self.layers])
