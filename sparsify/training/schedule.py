"""Schedules of the learning rate and of ProSparse's L1 weight.

Lambda follows arXiv 2402.13516, section 3.2: 0 during substitution, constant in the first
regularized stage, and in stage i >= 2 from T_{i-1} to T_i

    lambda(t) = l_{i-1} + eta (l_i - l_{i-1}),
    eta = (sin(-pi/2 + pi (t - T_{i-1}) / (T_i - T_{i-1})) + 1) / 2.

The stages are those of ProSparse-7B: its 16,500 steps are scaled to the length of the run, and its
lambdas are relative to the last one.
"""

from __future__ import annotations

import math

STAGES_7B = (
    (5_000, 0.0),
    (6_000, 5e-3),
    (10_000, 5e-2),
    (12_000, 5e-2),
    (16_000, 2e-1),
    (16_500, 2e-1),
)
"""ProSparse-7B's (T_i, lambda_i)."""


def l1_share(progress: float) -> float:
    """Return lambda(t) divided by its last value; `progress` in [0, 1] is t over the run."""
    step = progress * STAGES_7B[-1][0]
    before_t, before_l = 0, 0.0
    for i, (until, value) in enumerate(STAGES_7B):
        if step <= until:
            if i < 2:
                return value / STAGES_7B[-1][1]
            eta = (
                math.sin(-math.pi / 2 + math.pi * (step - before_t) / (until - before_t)) + 1
            ) / 2
            return (before_l + eta * (value - before_l)) / STAGES_7B[-1][1]
        before_t, before_l = until, value
    return 1.0


def lr_share(step: int, *, warmup: int, decay_from: int, total: int) -> float:
    """Return the share of the peak learning rate: linear warm-up, constant, decay to 5 %."""
    if step < warmup:
        return (step + 1) / warmup
    if step < decay_from:
        return 1.0
    return max(0.05, 1.0 - 0.95 * (step - decay_from) / max(1, total - decay_from))
