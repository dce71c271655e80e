"""The work of `sparsecast bench scaling`: shapes, amounts, and one process's part of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from sparsecast.cli.bench.export_model import ModelShape
from sparsecast.cli.bench.random_bundle import points
from sparsecast.core.distributed import DistributedContext

UNITS = {"collect": "tokens/s", "train": "token-layers/s", "sparsify": "tokens/s"}
"""Of the stages' rates."""
WARMUP = 2
"""Training steps of sparsify before those that are timed."""
STEPS = {"collect": 4, "train": 10, "sparsify": 1}
"""Batches (collect) and training steps of a round for each of --steps: the first two are short."""


class Sizes(NamedTuple):
    """A model and the work that its stages are timed on, the same for every number of processes."""

    model: ModelShape
    seq_len: int
    """Tokens of a sequence of collect, and of four times as many in sparsify."""
    batch_size: int
    """Sequences of a batch of collect."""
    train_tokens: int
    """Tokens of a step of train."""
    step_sequences: int
    """Sequences of a step of sparsify over all processes."""
    micro_batch: int | None
    """Of sparsify; where there is one, activations are computed again in the backward pass."""

    @property
    def rank(self) -> int:
        """Rank of every predictor."""
        return self.model.hidden // 4


SHAPES = {
    "tiny": Sizes(ModelShape(256, 1024, 6, 8, 2, 2048), 32, 8, 256, 8, None),
    "1b": Sizes(points.SHAPES["1b"], 512, 8, 4096, 16, 8),
    "7b": Sizes(points.SHAPES["7b"], 512, 8, 4096, 16, 2),
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One process's part of one run."""

    sizes: Sizes
    rounds: int
    steps: int
    """Of a round: batches of all processes (collect) or training steps."""
    device: torch.device
    context: DistributedContext
    folder: Path
    """For files of this process; whoever started the run removes it."""


class Timed(NamedTuple):
    """What one process says of a stage."""

    seconds: list[float]
    """Of every timed round."""
    amount: int
    """Tokens (train: tokens times layers) of a round, of all processes together."""
