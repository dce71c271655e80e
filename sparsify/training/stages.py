"""The published stages of ProSparse's regularization.

7B and 13B are ProSparse's (arXiv 2402.13516), 1B is MiniCPM-S-1B's. Every T_i times the tokens of
a step is the published number of accumulated tokens: 2,097,152 tokens a step for 7B, 8,388,608 for
13B, and 4,915,200 for 1B up to fine-tuning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Stage(NamedTuple):
    until: int
    """T_i: the last step of the stage, counted from the substitution of ReLU."""
    weight: float
    """lambda_i: the weight of the L1 term at that step."""
    tokens: float
    """Billions of tokens that have been trained on by then."""


@dataclass(frozen=True, kw_only=True)
class StageTable:
    """One published training."""

    regularized: tuple[Stage, ...]
    """Stages 0 (substitution), 1 (constant weight), and those in which the weight rises."""
    decay: Stage | None = None
    """Stage behind them of constant weight, in which the learning rate falls."""
    sft: Stage | None = None
    """Supervised fine-tuning behind that, of constant weight."""
    lr: float = 3e-5
    """Default peak learning rate: the published one, for 1B that of 7B."""

    @property
    def steps(self) -> int:
        """Steps of the training on plain text."""
        return (self.decay or self.regularized[-1]).until

    @property
    def last_weight(self) -> float:
        """Weight at the end of the training on plain text."""
        return (self.decay or self.regularized[-1]).weight


TABLES = {
    "1b": StageTable(
        regularized=(
            Stage(10_000, 0.0, 49.15),
            Stage(15_000, 1e-3, 73.73),
            Stage(20_000, 5e-3, 98.30),
            Stage(25_000, 5e-3, 122.88),
            Stage(35_000, 5e-2, 172.03),
        ),
        decay=Stage(95_000, 5e-2, 466.94),
        sft=Stage(101_000, 1e-2, 473.02),
    ),
    "7b": StageTable(
        regularized=(
            Stage(5_000, 0.0, 10.49),
            Stage(6_000, 5e-3, 12.58),
            Stage(10_000, 5e-2, 20.97),
            Stage(12_000, 5e-2, 25.17),
            Stage(16_000, 2e-1, 33.55),
            Stage(16_500, 2e-1, 34.60),
        ),
    ),
    "13b": StageTable(
        regularized=(
            Stage(5_500, 0.0, 46.14),
            Stage(6_750, 5e-3, 56.62),
            Stage(10_750, 1e-2, 90.18),
            Stage(11_000, 1e-2, 92.27),
            Stage(15_000, 2e-2, 125.83),
            Stage(16_000, 2e-2, 134.22),
        ),
        lr=5e-5,
    ),
}
