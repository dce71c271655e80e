"""The Lightning module of the default recipe: the predictors of all layers together.

    p = fc2 @ relu(fc1 @ x_hat),   x_hat = x / rms(x)

Training on RMS-normalized inputs changes no decision at threshold 0, because p is positively
homogeneous in x. Which point of the recall-sparsity curve to use is chosen afterwards by a cut;
bias.py says what carries it. Quantized predictors are
trained as they will be exported: weights and inputs of both products rounded, straight through.

The loss is binary cross entropy with inactive entries weighted by the layer's share of active ones,
which puts a small predictor's attention where cuts for high recall lie: at p = 0.5 of the weighted
probabilities, so at about that share of the true ones. In f16, where the rank is what there is too
little of, the second half of the epochs counts wrong decisions instead (loss.py), unless a recall
above `DEFAULT_RECALL` is wanted; that, and larger ranks, it makes a little worse.

Layers of different ranks are padded to the largest with units of zeros, which stay zeros: neither
a unit nor its column gets a gradient while the other is zero.

Shape letters: L layers, B batch, D hidden, F FFN width, R free hidden units, P packed width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from sparsecast.core.bitmask import unpack
from sparsecast.predictors.calibration.bias import (
    BiasUnits,
    Spread,
    UncalibratedPredictor,
    assembled,
    unit_rows,
)
from sparsecast.predictors.config import DEFAULT_RECALL, TrainConfig
from sparsecast.predictors.formats import straight_through
from sparsecast.predictors.metrics import ScoreHistogram
from sparsecast.predictors.predictor import Predictor, rms_normalized
from sparsecast.predictors.training.data import LayersBatch
from sparsecast.predictors.training.loss import weighted_loss
from sparsecast.predictors.training.warm_start import WarmStart


class PredictorModule(L.LightningModule):
    """Stacked predictors; every layer keeps the weights of its own best epoch.

    Args:
        cfg: Objective and learning rate.
        dtype: The format that is trained for.
        start: Initial weights, the share of active entries and, unless in f16, the bias direction
            u and an offset per neuron of every layer.
    """

    bias_LD: Tensor | None
    offset_LF: nn.Parameter | None
    rate_L: Tensor
    best_score_L: Tensor
    best_fc1_LRD: Tensor
    best_fc2_LFR: Tensor
    best_offset_LF: Tensor | None

    def __init__(self, cfg: TrainConfig, dtype: str, start: WarmStart) -> None:
        super().__init__()
        self.cfg = cfg
        self.stored_as = dtype
        self.register_buffer("bias_LD", start.bias_LD)
        self.register_buffer("rate_L", start.rate_L)
        counts = dtype == "f16" and cfg.recall <= DEFAULT_RECALL
        self._counting_from = max(1, -(-cfg.steps // 2)) if counts else cfg.steps
        self.fc1_LRD = nn.Parameter(start.fc1_LRD)
        self.fc2_LFR = nn.Parameter(start.fc2_LFR)
        self.offset_LF = None if start.offset_LF is None else nn.Parameter(start.offset_LF)
        # Buffers, so that a checkpoint has them.
        self.register_buffer("best_score_L", torch.full((len(start.rate_L),), -1.0))
        for name in ("fc1_LRD", "fc2_LFR", "offset_LF"):
            value: Tensor | None = getattr(start, name)
            self.register_buffer(f"best_{name}", None if value is None else value.clone())
        self._histograms: list[ScoreHistogram] = []

    def forward(self, x_LBD: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (L, B, F) and b (L, B, 1), or its stand-in 1, both for RMS-normalized inputs."""
        if self.bias_LD is None or self.offset_LF is None:
            hidden_LBR = torch.bmm(x_LBD, self.fc1_LRD.transpose(1, 2)).relu()
            return torch.bmm(hidden_LBR, self.fc2_LFR.transpose(1, 2)), x_LBD.new_ones(1, 1, 1)
        fc1, fc2 = assembled(
            self.fc1_LRD, self.fc2_LFR, self.offset_LF, self.bias_LD, self.stored_as
        )
        hidden_LBR = torch.bmm(straight_through(x_LBD, "q8_0"), fc1.transpose(1, 2)).relu()
        hidden_LBR = straight_through(hidden_LBR, "q8_0")
        return torch.bmm(hidden_LBR, fc2.transpose(1, 2)), hidden_LBR[..., :2].sum(-1, keepdim=True)

    def training_step(self, batch: LayersBatch, _: int) -> Tensor:
        logits_LBF, _bias = self(rms_normalized(batch.x_LBD))
        counting = self.current_epoch >= self._counting_from
        loss = weighted_loss(logits_LBF, batch.mask_LBP, self.rate_L, counting=counting)
        self.log("loss", loss.detach(), prog_bar=True)
        # Layers are independent: a sum over them gives each the step it would take alone.
        return loss * len(logits_LBF)

    def on_validation_epoch_start(self) -> None:
        self._histograms = [ScoreHistogram() for _ in range(len(self.rate_L))]

    def validation_step(self, batch: LayersBatch, _: int) -> None:
        logits_LBF, bias_LB1 = self(rms_normalized(batch.x_LBD))
        fired_LBF = unpack(batch.mask_LBP, logits_LBF.shape[-1])
        ratio = logits_LBF.float() / bias_LB1.float().clamp_min(1e-6)
        for layer, histogram in enumerate(self._histograms):
            histogram.add(ratio[layer], fired_LBF[layer])

    def on_validation_epoch_end(self) -> None:
        scores = [self._objective(histogram) for histogram in self._histograms]
        for layer, score in enumerate(scores):
            if score > self.best_score_L[layer]:
                self.best_score_L[layer] = score
                self.best_fc1_LRD[layer] = self.fc1_LRD[layer].detach()
                self.best_fc2_LFR[layer] = self.fc2_LFR[layer].detach()
                if self.best_offset_LF is not None and self.offset_LF is not None:
                    self.best_offset_LF[layer] = self.offset_LF[layer].detach()
        name = "sparsity at target" if self.cfg.target_sparsity is None else "recall at target"
        self.log(name, sum(scores) / len(scores), prog_bar=True)

    def _objective(self, histogram: ScoreHistogram) -> float:
        """The predicted sparsity at the stated recall, or the recall at the stated sparsity."""
        if self.cfg.target_sparsity is not None:
            return histogram.at(histogram.cut_for_sparsity(self.cfg.target_sparsity))[0]
        return histogram.at(histogram.cut_for_recall(self.cfg.recall))[1]

    def configure_optimizers(self) -> Any:
        groups = [{"params": [self.fc1_LRD, self.fc2_LFR], "weight_decay": 0.01}]
        if self.offset_LF is not None:
            groups.append({"params": [self.offset_LF], "weight_decay": 0.0})
        optimizer = torch.optim.AdamW(groups, lr=self.cfg.peak_lr, fused=True)
        total = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.cfg.peak_lr, total_steps=total, pct_start=0.1
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def uncut(
        self, free_units: list[int], constant_of: Callable[[int, Predictor], Tensor]
    ) -> list[UncalibratedPredictor]:
        """The best weights of every layer, without the padding behind its free units.

        Args:
            constant_of: From a layer and its predictor in f16 to the `Spread.constant_R`.
        """
        done: list[UncalibratedPredictor] = []
        for layer, free in enumerate(free_units):
            fc1_RD = self.best_fc1_LRD[layer, :free].cpu()
            fc2_FR = self.best_fc2_LFR[layer, :, :free].cpu()
            if self.best_offset_LF is None or self.bias_LD is None:
                weights = unit_rows(fc1_RD, fc2_FR)
                done.append(Spread(*weights, constant_of(layer, Predictor(*weights).stored())))
            else:
                offset_F, u_D = self.best_offset_LF[layer].cpu(), self.bias_LD[layer].cpu()
                done.append(BiasUnits(fc1_RD, fc2_FR, offset_F, u_D, self.stored_as))
        return done
