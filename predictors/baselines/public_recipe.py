"""The public recipe behind ProSparse's published predictors, as a baseline.

It trains on raw inputs and labels x1 != 0, with binary cross entropy weighted by
y + (1 - y) (mean y + 0.005), where the mean is over a batch; AdamW with weight decay 0.01 and a
constant learning rate; threshold 0. A layer keeps the epoch of best recall on calibration, and
stops after 5 epochs without a better one or above a recall of 0.99. (Deja Vu, arXiv 2310.17157, and
ProSparse, arXiv 2402.13516, appendix F; both trainers are public.)

All layers see the data in the same order. Each has its own weights, loss and best epoch, so it
trains as it would alone.

Shape letters: L layers, B batch, D hidden, F FFN width, R rank, P packed width.
"""

from __future__ import annotations

from collections.abc import Sequence

import lightning as L
import torch
from torch import Tensor, nn

from sparsecast.core.bitmask import unpack
from sparsecast.core.models.shape import ModelShape
from sparsecast.predictors.metrics import Counts, count
from sparsecast.predictors.predictor import Predictor
from sparsecast.predictors.training.data import LayersBatch
from sparsecast.predictors.training.schedule import Schedule

FLOOR = 0.005
"""Added to the weight of inactive entries."""
PATIENCE = 5
"""Epochs without a better recall before a layer stops."""
ENOUGH = 0.99
"""Recall above which a layer stops."""


class PublicRecipeModule(L.LightningModule):
    """Stacked predictors of one rank; the best weights are buffers, so checkpoints contain them.

    Args:
        layers: Layers to train; number and seed determine a layer's initial weights.
    """

    best_recall_L: Tensor
    best_epoch_L: Tensor
    best_fc1_LRD: Tensor
    best_fc2_LFR: Tensor

    def __init__(
        self,
        schedule: Schedule,
        *,
        layers: Sequence[int],
        rank: int,
        shape: ModelShape,
    ) -> None:
        super().__init__()
        self.learning_rate = schedule.peak_lr
        fc1_LRD = torch.empty(len(layers), rank, shape.hidden_size)
        fc2_LFR = torch.empty(len(layers), shape.ffn_width, rank)
        for place, layer in enumerate(layers):
            generator = torch.Generator().manual_seed(schedule.seed * 1_000_003 + layer)
            for weight in (fc1_LRD[place], fc2_LFR[place]):  # the initialization of nn.Linear
                bound = weight.shape[-1] ** -0.5
                nn.init.uniform_(weight, -bound, bound, generator=generator)
        self.fc1_LRD, self.fc2_LFR = nn.Parameter(fc1_LRD), nn.Parameter(fc2_LFR)
        self.register_buffer("best_fc1_LRD", fc1_LRD.clone())
        self.register_buffer("best_fc2_LFR", fc2_LFR.clone())
        self.register_buffer("best_recall_L", torch.full((len(layers),), -1.0))
        self.register_buffer("best_epoch_L", torch.zeros(len(layers), dtype=torch.int64))
        self._counts: list[Counts] = []

    def forward(self, x_LBD: Tensor) -> Tensor:
        """Logits (L, B, F)."""
        hidden_LBR = torch.bmm(x_LBD, self.fc1_LRD.transpose(1, 2)).relu()
        return torch.bmm(hidden_LBR, self.fc2_LFR.transpose(1, 2))

    def training_step(self, batch: LayersBatch, _: int) -> Tensor:
        logits_LBF = self(batch.x_LBD.float())
        fired = unpack(batch.mask_LBP, logits_LBF.shape[-1]).to(logits_LBF.dtype)
        inactive_L11 = fired.mean((1, 2), keepdim=True) + FLOOR
        total = nn.functional.binary_cross_entropy_with_logits(
            logits_LBF, fired, weight=fired + (1 - fired) * inactive_L11, reduction="sum"
        )
        # The sum of the layers' means, whose gradients are rounded alike beside any other layers.
        loss: Tensor = total / logits_LBF[0].numel()
        self.log("loss", loss.detach() / len(logits_LBF), prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        self._counts = [Counts(0, 0, 0, 0)] * len(self.best_recall_L)

    def validation_step(self, batch: LayersBatch, _: int) -> None:
        predicted_LBF = self(batch.x_LBD.float()) >= 0
        fired_LBF = unpack(batch.mask_LBP, predicted_LBF.shape[-1])
        self._counts = [
            before.plus(count(predicted_BF, fired_BF))
            for before, predicted_BF, fired_BF in zip(
                self._counts, predicted_LBF, fired_LBF, strict=True
            )
        ]

    def on_validation_epoch_end(self) -> None:
        for layer, counts in enumerate(self._counts):
            if not self._stopped(layer) and counts.recall > self.best_recall_L[layer]:
                self.best_recall_L[layer] = counts.recall
                self.best_epoch_L[layer] = self.current_epoch
                self.best_fc1_LRD[layer] = self.fc1_LRD[layer].detach()
                self.best_fc2_LFR[layer] = self.fc2_LFR[layer].detach()
        self.log("recall", sum(c.recall for c in self._counts) / len(self._counts), prog_bar=True)
        if all(self._stopped(layer, after=True) for layer in range(len(self._counts))):
            self.trainer.should_stop = True

    def _stopped(self, layer: int, *, after: bool = False) -> bool:
        """Whether this layer, trained alone, would have stopped before (or after) this epoch."""
        since = self.current_epoch - int(self.best_epoch_L[layer])
        return bool(self.best_recall_L[layer] > ENOUGH) or since >= PATIENCE + (not after)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=0.01)

    def best_predictors(self) -> list[Predictor]:
        """Each layer's predictor of its best epoch, in f16."""
        return [
            Predictor(fc1_RD.cpu(), fc2_FR.cpu()).stored("f16")
            for fc1_RD, fc2_FR in zip(self.best_fc1_LRD, self.best_fc2_LFR, strict=True)
        ]
