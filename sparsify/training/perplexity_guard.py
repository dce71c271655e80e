"""Let the threshold rise only while perplexity stays within a bound."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from transformers import PreTrainedModel

from sparsecast.core.models.perplexity import perplexity
from sparsecast.core.text.tokens import TokenBatch
from sparsecast.sparsify.training.raised_threshold import RaisedThreshold

CHECKS = 50
"""Measurements in a training."""
BATCHES = 1
"""Batches of calibration text per measurement."""


class PerplexityGuard(Callback):
    """Measure calibration perplexity now and then, and stop or resume the threshold's rise."""

    def __init__(
        self,
        raised: RaisedThreshold,
        dense: PreTrainedModel,
        calibration: Sequence[TokenBatch],
        increase: float,
        steps: int,
    ) -> None:
        """Measure `dense`, whose perplexity times 1 + `increase` is the bound."""
        self._raised = raised
        self._batches = calibration[:BATCHES]
        self._every = max(1, steps // CHECKS)
        self._bound = perplexity(dense, self._batches) * (1 + increase)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Measure, on every process, because the weights may be spread over them."""
        step = trainer.global_step
        if step % self._every or step < self._raised.first:
            return
        model: Any = pl_module.model
        model.eval()
        with torch.autocast(pl_module.device.type, enabled=False):
            within = perplexity(model, self._batches) <= self._bound
        model.train()
        self._raised.affordable.fill_(float(within))
