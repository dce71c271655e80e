"""Which gates fire and which are predicted, as one normal distribution.

The gate g of a neuron and its predictor's output p, for one token:

    g = mean + spread n + seen a + unseen b      n belongs to the neuron, a and b are of both;
    p = start + spread n + seen a                n, a, b are independent and standard normal

The neuron fires if g > 0 and is predicted if p >= 0. `seen`^2 + `unseen`^2 is 1: a is what the
predictor reads of the token, b is what it does not. Over neurons and tokens together (g, p) is
bivariate normal, so each number follows from one asked share:

    mean      P(g > 0) = 1 - true sparsity
    spread    P(n is among the hottest, g > 0) = 0.8 P(g > 0)
    start     P(p >= 0) = 1 - predicted sparsity
    seen      P(p >= 0, g > 0) = recall P(g > 0)

p is the best that a predictor can do with n and a, because E[g | n, a] differs from it by a
constant.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsecast.cli.bench.random_bundle.normal import STANDARD, both_below, root
from sparsecast.cli.bench.random_bundle.points import Point
from sparsecast.core.errors import InputError

HOT_ACTIVATIONS = 0.8
"""Share of all activations that `Point.hot_neurons` is about."""
NEARLY_ONE = 0.9999
"""The largest correlation tried."""


@dataclass(frozen=True)
class Design:
    """The numbers above."""

    mean: float
    spread: float
    start: float
    seen: float

    @property
    def unseen(self) -> float:
        return math.sqrt(1 - self.seen**2)

    def rates(self, n_F: Tensor) -> Tensor:
        """Return the share of tokens on which each neuron fires, (F,) float64."""
        rate_F: Tensor = torch.special.ndtr(self.mean + self.spread * n_F)
        return rate_F


def design_for(point: Point) -> Design:
    """Solve for a point.

    Raises:
        InputError: No predictor has this recall at this predicted sparsity, or none is needed for
            it: how often each neuron fires is enough.
    """
    fires = 1 - point.true_sparsity
    g, p = STANDARD.inv_cdf(fires), STANDARD.inv_cdf(1 - point.predicted_sparsity)
    hot = STANDARD.inv_cdf(point.hot_neurons)

    def skew(r: float) -> float:
        return both_below(hot, g, r) - HOT_ACTIVATIONS * fires

    def hits(r: float) -> float:
        return both_below(p, g, r) - point.recall * fires

    # Correlations with g: of the neuron's share, and of p.
    of_n, of_p = root(skew, 0, NEARLY_ONE), root(hits, 0, NEARLY_ONE)
    if not of_n < of_p < NEARLY_ONE - 1e-6:
        raise InputError(
            f"recall: got {point.recall:g} at a predicted sparsity of "
            f"{point.predicted_sparsity:g}, which no predictor of gates with a true sparsity of "
            f"{point.true_sparsity:g} has; choose shares between those of perfect predictions and "
            "those of the firing rates alone"
        )
    spread = of_n / math.sqrt(1 - of_n**2)
    scale = math.sqrt(1 + spread**2)
    seen = math.sqrt((of_p * scale) ** 2 - spread**2)
    return Design(mean=g * scale, spread=spread, start=p * of_p * scale, seen=seen)


def neurons(width: int, generator: torch.Generator) -> Tensor:
    """Return n of every neuron of a layer: the quantiles of a normal, shuffled, (F,) float64."""
    share_F = (torch.arange(width, dtype=torch.float64) + 0.5) / width
    quantile_F: Tensor = torch.special.ndtri(share_F)
    return quantile_F[torch.randperm(width, generator=generator)]
