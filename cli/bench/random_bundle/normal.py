"""The bivariate normal distribution, and the root of an increasing function."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np

STANDARD = NormalDist()
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(100)
STEPS = 60
"""Halvings of an interval, to the last bits of a float64."""


def both_below(h: float, k: float, r: float) -> float:
    """Return P(X <= h and Y <= k) for standard normal X and Y of correlation r in [0, 1).

    Plackett's integral (Biometrika 41, 1954), with t the sine of the angle:

        Phi(h) Phi(k) + 1 / (2 pi) int_0^asin(r) exp(-(h^2 + k^2 - 2 h k t) / (2 (1 - t^2)))
    """
    width = math.asin(r)
    t = np.sin(width * (_NODES + 1) / 2)
    density = np.exp(-(h * h + k * k - 2 * h * k * t) / (2 * (1 - t * t)))
    area = width / 2 * float(_WEIGHTS @ density)
    return STANDARD.cdf(h) * STANDARD.cdf(k) + area / (2 * math.pi)


def root(increasing: Callable[[float], float], low: float, high: float) -> float:
    """Return where a function crosses zero between `low` and `high`, which is assumed to do so."""
    for _ in range(STEPS):
        middle = (low + high) / 2
        if increasing(middle) < 0:
            low = middle
        else:
            high = middle
    return low
