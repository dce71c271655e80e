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
from sparsecast.predictors.training.resident import ResidentBlocks, fits_on
from sparsecast.predictors.training.warm_start import Moments, moments


class Batches(Protocol):
    """Training batches, equally many in each epoch."""

    epoch: int
    """Epoch of the next iteration; a resumed run starts at a later one."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[LayersBatch]: ...


def calibration_batches(store: ActivationStore, plan: TrainingPlan) -> Any:
    """Every row of the calibration split in order, of `plan.own_layers`."""
    return _recorded_batches(store, "calibration", plan, None, (0, 1), values=False)


def _recorded_batches(
    store: ActivationStore,
    split: str,
    plan: TrainingPlan,
    seed: int | None,
    share: tuple[int, int],
    *,
    values: bool,
) -> Any:
    size, device, own = plan.schedule.batch_tokens, plan.device, plan.own_layers
    on_gpu = device.type == "cuda"
    if plan.shape.experts:
        return ExpertBatches(store, split, size, seed, ffns=own, for_gpu=on_gpu)
    more: dict[str, Any] = {"layers": own, "share": share, "values": values}
    if fits_on(device, store, split, plan.layers_of_a_process, values=values):
        return ResidentBlocks(store, split, size, seed, device=device, **more)
    return TokenBlocks(store, split, size, seed, for_gpu=on_gpu, **more)


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
        seed = plan.schedule.seed
        share, values = plan.batch_share, plan.loss == "value"
        return _recorded_batches(self.store, "train", plan, seed, share, values=values)

    def moments(self, layers: Sequence[int], device: torch.device) -> Iterator[Moments]:
        for layer in layers:
            yield moments(self.store, layer, device)

    def tell_skipped(self) -> None:
        """Log nothing: `collect` has told."""
