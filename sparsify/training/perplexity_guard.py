"""Let the threshold rise only while perplexity stays within a bound."""

from __future__ import annotations

from math import log
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from sparsecast.core.text.tokens import TokenBatch
from sparsecast.sparsify.training.cross_entropy import IGNORED
from sparsecast.sparsify.training.lightning_module import SparsifyModule
from sparsecast.sparsify.training.raised_threshold import RaisedThreshold

CHECKS = 50
"""Measurements in a training."""


class PerplexityGuard(Callback):
    """Measure perplexity now and then, and stop or resume the threshold's rise."""

    def __init__(
        self, raised: RaisedThreshold, batch: TokenBatch, bound: float, steps: int
    ) -> None:
        """Watch a training.

        Args:
            batch: Text that it does not train on.
            bound: Largest perplexity on that text.
            steps: Optimizer steps of the training.
        """
        self._raised = raised
        self._ids_BS = batch.ids_BS.cpu()
        self._labels_BS = torch.where(batch.keep_BS, batch.ids_BS, IGNORED).cpu()
        self._bound = log(bound)
        self._every = max(1, steps // CHECKS)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Measure on every process, because the weights may be spread over them."""
        assert isinstance(pl_module, SparsifyModule)
        step = trainer.global_step
        if step % self._every == 0 and step >= self._raised.first:
            ids_BS, labels_BS = (x.to(pl_module.device) for x in (self._ids_BS, self._labels_BS))
            nll = pl_module.mean_nll(ids_BS, labels_BS)
            self._raised.affordable.copy_(nll <= self._bound)
