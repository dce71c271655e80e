"""Schedules of the learning rate and of ProSparse's L1 weight.

Lambda follows arXiv 2402.13516, section 3.2: 0 during substitution, t <= T_0; lambda_1 in the first
regularized stage, T_0 < t <= T_1; and in stage i >= 2, T_{i-1} < t <= T_i,

    lambda(t) = l_{i-1} + eta (l_i - l_{i-1}),
    eta = (sin(-pi/2 + pi (t - T_{i-1}) / (T_i - T_{i-1})) + 1) / 2.

Behind these stages a table may have one in which the learning rate decays, then one of supervised
fine-tuning, each of constant weight.
"""

from __future__ import annotations

import math

from sparsecast.sparsify.training.stages import StageTable


def l1_weight(t: float, table: StageTable) -> float:
    """Return the published lambda of step `t`, the first step being 1."""
    start, low = 0, 0.0
    for i, stage in enumerate(table.regularized):
        if t <= stage.until:
            if i < 2:
                return stage.weight
            eta = (math.sin(math.pi * ((t - start) / (stage.until - start) - 0.5)) + 1) / 2
            return low + eta * (stage.weight - low)
        start, low = stage.until, stage.weight
    if table.sft is not None and t > table.steps:
        return table.sft.weight
    return table.last_weight


def l1_share(step: int, steps: int, table: StageTable) -> float:
    """Return lambda relative to its last value before fine-tuning, for a run of another length.

    Args:
        step: Of the run's sparse training; the first one is 1.
        steps: The run's steps of sparse training, over which the table's are scaled.
    """
    return l1_weight(step * table.steps / steps, table) / table.last_weight


def lr_share(step: int, *, warmup: int, decay_from: int, total: int) -> float:
    """Return the share of the peak learning rate: linear warm-up, constant, decay to 5 %."""
    if step < warmup:
        return (step + 1) / warmup
    if step < decay_from:
        return 1.0
    return max(0.05, 1.0 - 0.95 * (step - decay_from) / max(1, total - decay_from))
