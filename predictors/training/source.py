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
from sparsecast.predictors.training.expert_data import ExpertBatches
from sparsecast.predictors.training.plan import TrainingPlan
from sparsecast.predictors.training.warm_start import Moments, moments


class Batches(Protocol):
    """Training batches, equally many in each epoch."""

    epoch: int
    """Epoch of the next iteration; a resumed run starts at a later one."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[LayersBatch]: ...


def calibration_batches(store: ActivationStore, plan: TrainingPlan) -> Any:
    """Every row of the calibration split in order, of `plan.own_layers`."""
    size, on_gpu = plan.schedule.batch_tokens, plan.device.type == "cuda"
    if plan.shape.experts:
        return ExpertBatches(store, "calibration", size, ffns=plan.own_layers, for_gpu=on_gpu)
    return TokenBlocks(store, "calibration", size, layers=plan.own_layers, for_gpu=on_gpu)


class Source(Protocol):
    """Where a run gets its training tokens."""

    @property
    def store(self) -> ActivationStore:
        """Holds the manifest and at least the calibration split."""

    def batches(self, plan: TrainingPlan) -> Batches:
        """Shuffled training batches of `plan.own_layers`: this process's share of them."""

    def moments(self, layers: Sequence[int], device: torch.device) -> Iterator[Moments]:
        """Moments of the training tokens of each layer, in order."""

    def tell_skipped(self) -> None:
        """Log the rows of the text that could not be used."""


@dataclass(frozen=True)
class RecordedSource:
    """The training split of recorded activations."""

    store: ActivationStore

    def batches(self, plan: TrainingPlan) -> Any:
        if plan.shape.experts:
            return ExpertBatches(
                self.store,
                "train",
                plan.schedule.batch_tokens,
                plan.schedule.seed,
                ffns=plan.own_layers,
                for_gpu=plan.device.type == "cuda",
            )
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

    def tell_skipped(self) -> None:
        """Log nothing: `collect` has told."""
