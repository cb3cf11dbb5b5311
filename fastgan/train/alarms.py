"""Alarms: signs in the figures of a run that it will come to nothing, each with advice.

They look at figures of logged steps, and at the samples whenever a grid of them is drawn, so they add nothing to the
steps between. The limits lie far from what a run that ends well shows (default DCGAN on the digits, four epochs; medians over
200 steps): D(x) up to 0.93 and D(G(z)) down to 0.08 with two seeds; with one a gradient of a quarter of its largest, and samples
0.88 times as diverse as the images at step 624, 0.96 times at step 1248.
"""

import math
import statistics
from collections import deque
from typing import Any

from torch import Tensor, nn

# Figures are judged by their median over so many steps (and at least so many logged ones), so that neither a step out of
# the ordinary raises an alarm nor one ends it.
WINDOW_STEPS, WINDOW_RECORDS = 200, 5
# A discriminator that is wrong about less than one image in a hundred.
SURE = 0.99
# The generator's gradient beside its largest in the first window, and at least a tenth of the 1e-8 that Adam adds to the
# gradient's size: below that Adam no longer makes up for a small gradient.
VANISHED, VANISHED_FOR_ADAM = 1e-3, 1e-9
# Root mean squared distance between two samples, beside that between two training images. Samples of an untrained
# generator are all alike, so the first steps do not count.
COLLAPSED, COLLAPSE_FROM_STEP = 0.5, 500

ADVICE = {
    "discriminator has won": "lower --learning-rate, use --augment where images are few, or --generator-loss hinge",
    "mode collapse": "lower --learning-rate, raise --batch-size, or use another --generator-loss, such as hinge",
    "vanishing generator gradient": "use --generator-loss non_saturating if it is not, and a lower --learning-rate",
}  # fmt: skip


class Alarms:
    """Watches the figures of a run; an alarm is raised once an episode, that is again only after its cause was gone.

    Args:
        loss: the kind of the generator's loss. With some the discriminator's outputs are no probabilities, and whether
            it has won is not watched.
        parts: independent networks side by side, whose samples are compared with samples of the same network alone.
    """

    def __init__(self, loss: str, parts: int = 1):
        self.probabilities, self.parts = loss in ("non_saturating", "minimax"), parts
        self._windows: dict[str, deque[tuple[int, float]]] = {}
        self._first_gradient = 0.0
        self._ringing: set[str] = set()

    def logged(self, step: int, figures: dict[str, float], generator: nn.Module, gradient_scale: float = 1.0) -> list[dict]:
        """To be called after a logged step.

        Args:
            step: its number.
            figures: what is logged of it.
            generator: its ``.grad`` are those of this step, times ``gradient_scale``.

        Returns:
            Alarms that this step raises: ``step``, ``alarm`` (its name), ``message`` and the figures behind it.
        """
        found = []
        if self.probabilities and "d_real" in figures:
            real, fake = self._median(step, "d_real", figures["d_real"]), self._median(step, "d_fake", figures["d_fake"])
            if real is not None:
                found += self._raise(
                    step, "discriminator has won", real > SURE and fake < 1 - SURE,
                    f"D(x) is {real:.4f} and D(G(z)) {fake:.4f}", d_real=real, d_fake=fake,
                )  # fmt: skip
        size = gradient_size(generator) / gradient_scale
        median = self._median(step, "gradient", size)
        if median is None:
            self._first_gradient = max(self._first_gradient, size if math.isfinite(size) else 0.0)
        else:
            limit = max(VANISHED * self._first_gradient, VANISHED_FOR_ADAM)
            found += self._raise(
                step, "vanishing generator gradient", median < limit,
                f"it is {median:.1e} a weight, and was {self._first_gradient:.1e} at the start",
                gradient=median, gradient_at_start=self._first_gradient,
            )  # fmt: skip
        return found

    def drawn(self, step: int, samples: Tensor, images: Tensor) -> list[dict]:
        """To be called when samples were drawn from fixed noise.

        Args:
            step: the number of the step before.
            samples, images: generated and training images [N, C, H, W], in ``parts`` equal parts.

        Returns:
            As :meth:`logged`.
        """
        if step < COLLAPSE_FROM_STEP or min(len(samples), len(images)) < 2 * self.parts:
            return []
        ratios = diversity(samples, self.parts) / diversity(images, self.parts)
        ratio = float(ratios.amin())
        which = f" (network {int(ratios.argmin())} of {self.parts})" if self.parts > 1 else ""
        return self._raise(
            step, "mode collapse", ratio < COLLAPSED,
            f"two samples differ {ratio:.2f} times as much as two training images{which}", diversity=ratio,
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        return {
            "windows": {name: list(window) for name, window in self._windows.items()},
            "first_gradient": self._first_gradient,
            "ringing": sorted(self._ringing),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._windows = {name: deque(window) for name, window in state["windows"].items()}
        self._first_gradient = state["first_gradient"]
        self._ringing = set(state["ringing"])

    def _median(self, step: int, name: str, value: float) -> float | None:
        """Of the figure's window with this value in it; None while the window is not full. Values that are not finite
        (gradients of float16 before their scale is found) do not count."""
        window = self._windows.setdefault(name, deque())
        if math.isfinite(value):
            window.append((step, value))
        while len(window) > WINDOW_RECORDS and window[1][0] <= step - WINDOW_STEPS:
            window.popleft()
        if len(window) < WINDOW_RECORDS or window[0][0] > step - WINDOW_STEPS:
            return None
        return statistics.median(value for _, value in window)

    def _raise(self, step: int, name: str, wrong: bool, found: str, **figures: float) -> list[dict]:
        rings = name in self._ringing
        (self._ringing.add if wrong else self._ringing.discard)(name)
        if not wrong or rings:
            return []
        return [{"step": step, "alarm": name, "message": f"{name}: {found}. Advice: {ADVICE[name]}", **figures}]


def gradient_size(network: nn.Module) -> float:
    """Root mean square of a network's gradient."""
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    return float(norm) / math.sqrt(sum(gradient.numel() for gradient in gradients))


def diversity(images: Tensor, parts: int = 1) -> Tensor:
    """Root mean squared distance between two images of a part, for each of the equal parts of [N, C, H, W]."""
    # The mean squared distance of pairs is twice the variance, summed over the pixels.
    return (2 * images.float().unflatten(0, (parts, -1)).flatten(2).var(1).sum(1)).sqrt()
