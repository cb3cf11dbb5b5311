"""Averages of the weights over the steps of a run."""

from itertools import chain

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class RampedAverage(AveragedModel):
    """An exponential average of weights and buffers that forgets its beginning: decay (1 + n) / (10 + n) after n updates, until
    that exceeds ``decay``.

    AveragedModel's own update copies the count to the device and back for every average; here it stays on the CPU, and no
    update waits for the device.

    Args:
        model: copied.
        decay: of the average, in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float):
        super().__init__(model, use_buffers=True)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        averaged, current = (list(chain(net.parameters(), net.buffers())) for net in (self.module, model))
        n = int(self.n_averaged)
        if n == 0:
            torch._foreach_copy_(averaged, current)
        else:
            average = get_ema_multi_avg_fn(min(self.decay, (1 + n) / (10 + n)))
            for floating in (True, False):  # it takes either kind, not both at once
                pairs = [pair for pair in zip(averaged, current) if _is_floating(pair[0]) == floating]
                if pairs:
                    average(*map(list, zip(*pairs)), n)
        self.n_averaged += 1


def _is_floating(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
