"""Known one-dimensional distributions, and how far samples are from them."""

import dataclasses
import math

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Mixture:
    """A mixture of Gaussians with equal weights; one Gaussian where there is one mean.

    Args:
        means: of the parts.
        stds: of the parts, above 0.

    Raises:
        ValueError: counts that differ, a standard deviation that is not above 0, or numbers of 1e18 and more, whose squares
            float32 does not hold.
    """

    means: tuple[float, ...]
    stds: tuple[float, ...]

    def __post_init__(self):
        if not self.means or len(self.means) != len(self.stds):
            raise ValueError(f"Mixture: means and stds must be equally many, got {len(self.means)} and {len(self.stds)}")
        if not all(abs(value) < 1e18 for value in (*self.means, *self.stds)):
            raise ValueError(f"Mixture: means and stds must be below 1e18 in size, got {self.means} and {self.stds}")
        if min(self.stds) <= 0:
            raise ValueError(f"Mixture: stds must be above 0, got {self.stds}")

    @property
    def mean(self) -> float:
        """Of the whole mixture."""
        return sum(self.means) / len(self.means)

    @property
    def std(self) -> float:
        """Of the whole mixture."""
        squares = sum(mean**2 + std**2 for mean, std in zip(self.means, self.stds)) / len(self.means)
        return math.sqrt(squares - self.mean**2)

    def sample(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Independent samples, float32 of the ``shape`` asked for, drawn from ``generator``."""
        if len(self.means) == 1:
            return torch.empty(shape).normal_(self.means[0], self.stds[0], generator=generator)
        part = torch.randint(len(self.means), shape, generator=generator)
        noise = torch.randn(shape, generator=generator)
        return torch.tensor(self.means)[part] + torch.tensor(self.stds)[part] * noise

    def density(self, x: Tensor) -> Tensor:
        """Probability density at each place ``x``, shape of x."""
        return sum(
            torch.exp(-0.5 * ((x - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi))
            for mean, std in zip(self.means, self.stds)
        ) / len(self.means)

    def cumulative(self, x: Tensor) -> Tensor:
        """Probability of a value below each ``x``, shape of x."""
        return sum(
            0.5 * (1 + torch.erf((x - mean) / (std * math.sqrt(2)))) for mean, std in zip(self.means, self.stds)
        ) / len(self.means)

    def limits(self, deviations: float) -> tuple[float, float]:
        """From the lowest to the highest part, each with so many ``deviations`` of its own around it."""
        return (
            min(mean - deviations * std for mean, std in zip(self.means, self.stds)),
            max(mean + deviations * std for mean, std in zip(self.means, self.stds)),
        )


def distances(samples: Tensor, data: Mixture) -> dict[str, Tensor]:
    """How far samples are from the data's distribution.

    Args:
        samples: [S, N], N of each of S generators.
        data: the distribution.

    Returns:
        By name, tensors [S]: ``mean_error`` (absolute), ``std_ratio`` (1 for the data's own width), ``ks``
        (Kolmogorov-Smirnov: the largest difference of the cumulative distributions), ``wasserstein`` (order 1, in
        units of x), ``js`` (Jensen-Shannon divergence of histograms of 60 bins, in nats: log 2 for distributions
        that nowhere overlap).
    """
    ordered = samples.double().sort(1).values
    count = ordered.shape[1]
    cumulative = data.cumulative(ordered)
    steps = torch.arange(count + 1, dtype=torch.float64) / count
    low, high = data.limits(8)
    grid = torch.linspace(low, high, 20001, dtype=torch.float64)
    middles = (steps[1:] + steps[:-1]) / 2
    quantiles = grid[torch.searchsorted(data.cumulative(grid), middles).clamp(max=len(grid) - 1)]
    # The outer bins take what lies beyond.
    edges = torch.linspace(*data.limits(4), 61, dtype=torch.float64)
    edges[0], edges[-1] = -torch.inf, torch.inf
    expected = data.cumulative(edges).diff()
    found = torch.searchsorted(ordered, edges.expand(len(ordered), -1).contiguous()).diff() / count
    mixed = (expected + found) / 2
    divergence = torch.xlogy(expected, expected / mixed) + torch.xlogy(found, found / mixed.clamp(min=1e-300))
    return {
        "mean_error": (ordered.mean(1) - data.mean).abs(),
        "std_ratio": ordered.std(1) / data.std,
        "ks": torch.maximum((cumulative - steps[:-1]).abs(), (cumulative - steps[1:]).abs()).max(1).values,
        "wasserstein": (ordered - quantiles).abs().mean(1),
        "js": divergence.nansum(1) / 2,
    }
