"""How long and how fast predictors train."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Epochs, batches and learning rate of one training run."""

    num_epochs: int
    batch_tokens: int
    """Tokens per optimizer step, the same for all layers."""
    peak_lr: float
    seed: int = 0
    """Seed of the data order and of random initial weights."""
