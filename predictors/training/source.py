"""Where training batches come from: an activation store, whole.

`online.Running` is the other source, a model that is running. Both have a store; that of a running
model holds the calibration documents alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from sparsecast.collect.store.store import ActivationStore
from sparsecast.predictors.config import TrainConfig
from sparsecast.predictors.training.data import LayersBatch, TokenBlocks
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

    def batches(
        self,
        cfg: TrainConfig,
        layers: Sequence[int],
        device: torch.device,
        share: tuple[int, int],
    ) -> Batches:
        """Shuffled training batches of `layers` for `device`, the i-th of every n of them."""

    def moments(self, layers: Sequence[int], device: torch.device) -> Iterator[Moments]:
        """Of the training tokens of each layer, in order."""


@dataclass(frozen=True)
class Recorded:
    """The training split of a store."""

    store: ActivationStore

    def batches(
        self,
        cfg: TrainConfig,
        layers: Sequence[int],
        device: torch.device,
        share: tuple[int, int],
    ) -> Any:
        return TokenBlocks(
            self.store,
            "train",
            cfg.tokens_per_step,
            cfg.seed,
            layers=layers,
            for_gpu=device.type == "cuda",
            share=share,
        )

    def moments(self, layers: Sequence[int], device: torch.device) -> Iterator[Moments]:
        for layer in layers:
            yield moments(self.store, layer, device)
