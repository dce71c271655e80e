"""Sources of training batches: recorded activations here, a running model in online.py.

Both have an activation store; that of a running model holds only the calibration documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from sparsecast.collect.store.store import ActivationStore
from sparsecast.predictors.training.data import LayersBatch, TokenBlocks
from sparsecast.predictors.training.plan import TrainingPlan
from sparsecast.predictors.training.warm_start import Moments, moments


class Batches(Protocol):
    """The batches of one epoch after the other, equally many in each."""

    epoch: int
    """Which one the next iteration is; any may be asked for, as a resumed run does."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[LayersBatch]: ...


class Source(Protocol):
    @property
    def store(self) -> ActivationStore:
        """At least the calibration split, and the manifest."""

    def batches(self, plan: TrainingPlan) -> Batches:
        """Shuffled training batches of `plan.own_layers`: this process's share of them."""

    def moments(self, layers: Sequence[int], device: torch.device) -> Iterator[Moments]:
        """Of the training tokens of each layer, in order."""


@dataclass(frozen=True)
class RecordedSource:
    """The training split of a store."""

    store: ActivationStore

    def batches(self, plan: TrainingPlan) -> Any:
        return TokenBlocks(
            self.store,
            "train",
            plan.schedule.batch_tokens,
            plan.schedule.seed,
            layers=plan.own_layers,
            for_gpu=plan.device.type == "cuda",
            share=plan.batch_share,
        )

    def moments(self, layers: Sequence[int], device: torch.device) -> Iterator[Moments]:
        for layer in layers:
            yield moments(self.store, layer, device)
