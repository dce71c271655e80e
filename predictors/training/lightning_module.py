"""The Lightning module of the default recipe: predictors of all layers, trained together.

    p = fc2 @ relu(fc1 @ x_hat),   x_hat = x / rms(x)

Training on RMS-normalized inputs changes no decision at threshold 0, because p is positively
homogeneous in x. The operating point on the recall-sparsity curve is chosen after training, by a
threshold that predictors/calibration/bias.py folds into the weights. Quantized predictors are
trained as they will be exported: weights and inputs of both products are rounded, with
straight-through gradients.

The loss is binary cross entropy with inactive entries weighted by the layer's share of active ones.
Active entries weigh what the neuron adds to the residual stream, where that is known (loss.py).
This focuses a small predictor on the decision boundary used at high recall: weighted probabilities
of 0.5 are true probabilities of about that share. In f16, where the rank is scarce, the second half
of the epochs counts wrong decisions instead (loss.py), unless the target recall is above
`DEFAULT_RECALL`: counting makes such recalls, and larger ranks, slightly worse.

Layers of smaller rank are padded with zero units. Padding stays zero: a unit's row and column get
no gradient while the other is zero.

Shape letters: L layers, B batch, D hidden, F FFN width, R free hidden units, P packed width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn

from sparsecast.core.bitmask import unpack
from sparsecast.predictors.calibration.bias import assembled
from sparsecast.predictors.calibration.objective import DEFAULT_RECALL, Objective
from sparsecast.predictors.formats import straight_through
from sparsecast.predictors.metrics import ScoreHistogram
from sparsecast.predictors.predictor import rms_normalized
from sparsecast.predictors.training.data import LayersBatch
from sparsecast.predictors.training.loss import weighted_loss
from sparsecast.predictors.training.schedule import Schedule
from sparsecast.predictors.training.warm_start import WarmStart


class TrainedWeights(NamedTuple):
    """One layer's weights on the CPU; in f16 without bias, offset and mean input."""

    fc1_RD: Tensor
    fc2_FR: Tensor
    offset_F: Tensor | None
    bias_D: Tensor | None
    mean_D: Tensor | None


class PredictorModule(L.LightningModule):
    """Stacked predictors; each layer keeps the weights of its own best epoch.

    Args:
        start: Initial weights and, for quantized formats, bias direction, mean input and offsets.
        dtype: The format that is trained for.
        objective: Decides which epoch of a layer is its best.
    """

    bias_LD: Tensor | None
    mean_LD: Tensor | None
    offset_LF: nn.Parameter | None
    rate_L: Tensor
    best_score_L: Tensor
    best_fc1_LRD: Tensor
    best_fc2_LFR: Tensor
    best_offset_LF: Tensor | None

    def __init__(
        self, start: WarmStart, *, dtype: str, objective: Objective, schedule: Schedule
    ) -> None:
        super().__init__()
        self.stored_dtype = dtype
        self.objective = objective
        self.peak_lr = schedule.peak_lr
        self.register_buffer("bias_LD", start.bias_LD)
        self.register_buffer("mean_LD", start.mean_LD)
        self.register_buffer("rate_L", start.rate_L)
        counts = dtype == "f16" and objective.recall <= DEFAULT_RECALL
        num_epochs = schedule.num_epochs
        self._counting_from = max(1, -(-num_epochs // 2)) if counts else num_epochs
        self.fc1_LRD = nn.Parameter(start.fc1_LRD)
        self.fc2_LFR = nn.Parameter(start.fc2_LFR)
        self.offset_LF = None if start.offset_LF is None else nn.Parameter(start.offset_LF)
        # Buffers, so that checkpoints contain them.
        self.register_buffer("best_score_L", torch.full((len(start.rate_L),), -1.0))
        for name in ("fc1_LRD", "fc2_LFR", "offset_LF"):
            value: Tensor | None = getattr(start, name)
            self.register_buffer(f"best_{name}", None if value is None else value.clone())
        self._histograms: list[ScoreHistogram] = []

    def forward(self, x_LBD: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (L, B, F) and the bias b (L, B, 1) for RMS-normalized inputs; b is 1 in f16."""
        if self.bias_LD is None or self.mean_LD is None or self.offset_LF is None:
            hidden_LBR = torch.bmm(x_LBD, self.fc1_LRD.transpose(1, 2)).relu()
            return torch.bmm(hidden_LBR, self.fc2_LFR.transpose(1, 2)), x_LBD.new_ones(1, 1, 1)
        fc1, fc2 = assembled(
            self.fc1_LRD,
            self.fc2_LFR,
            self.offset_LF,
            self.bias_LD,
            self.mean_LD,
            self.stored_dtype,
        )
        hidden_LBR = torch.bmm(straight_through(x_LBD, "q8_0"), fc1.transpose(1, 2)).relu()
        hidden_LBR = straight_through(hidden_LBR, "q8_0")
        return torch.bmm(hidden_LBR, fc2.transpose(1, 2)), hidden_LBR[..., :2].sum(-1, keepdim=True)

    def training_step(self, batch: LayersBatch, _: int) -> Tensor:
        logits_LBF, _bias = self(rms_normalized(batch.x_LBD))
        counting = self.current_epoch >= self._counting_from
        loss = weighted_loss(
            logits_LBF, batch.mask_LBP, self.rate_L, batch.value_LBF, counting=counting
        )
        self.log("loss", loss.detach(), prog_bar=True)
        # Layers are independent: their sum gives each layer the gradient it would have alone.
        return loss * len(logits_LBF)

    def on_validation_epoch_start(self) -> None:
        self._histograms = [ScoreHistogram() for _ in range(len(self.rate_L))]

    def validation_step(self, batch: LayersBatch, _: int) -> None:
        logits_LBF, bias_LB1 = self(rms_normalized(batch.x_LBD))
        fired_LBF = unpack(batch.mask_LBP, logits_LBF.shape[-1])
        ratio = logits_LBF.float() / bias_LB1.float().clamp_min(1e-6)
        for layer, histogram in enumerate(self._histograms):
            rows = slice(None if batch.rows is None else batch.rows[layer])
            histogram.add(ratio[layer, rows], fired_LBF[layer, rows])

    def on_validation_epoch_end(self) -> None:
        scores = [self.objective.epoch_score(histogram) for histogram in self._histograms]
        for layer, score in enumerate(scores):
            if score > self.best_score_L[layer]:
                self.best_score_L[layer] = score
                self.best_fc1_LRD[layer] = self.fc1_LRD[layer].detach()
                self.best_fc2_LFR[layer] = self.fc2_LFR[layer].detach()
                if self.best_offset_LF is not None and self.offset_LF is not None:
                    self.best_offset_LF[layer] = self.offset_LF[layer].detach()
        name = "sparsity at target" if self.objective.sparsity is None else "recall at target"
        self.log(name, sum(scores) / len(scores), prog_bar=True)

    def configure_optimizers(self) -> Any:
        groups = [{"params": [self.fc1_LRD, self.fc2_LFR], "weight_decay": 0.01}]
        if self.offset_LF is not None:
            groups.append({"params": [self.offset_LF], "weight_decay": 0.0})
        optimizer = torch.optim.AdamW(groups, lr=self.peak_lr, fused=True)
        total = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.peak_lr, total_steps=total, pct_start=0.1
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def best_weights(self, free_units: Sequence[int]) -> list[TrainedWeights]:
        """Each layer's weights of its best epoch.

        Args:
            free_units: Hidden units of each layer; the padding behind them is dropped.
        """
        return [
            TrainedWeights(
                self.best_fc1_LRD[layer, :units].cpu(),
                self.best_fc2_LFR[layer, :, :units].cpu(),
                None if self.best_offset_LF is None else self.best_offset_LF[layer].cpu(),
                None if self.bias_LD is None else self.bias_LD[layer].cpu(),
                None if self.mean_LD is None else self.mean_LD[layer].cpu(),
            )
            for layer, units in enumerate(free_units)
        ]
