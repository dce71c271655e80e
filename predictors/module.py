"""The Lightning module that trains the predictors of all layers together.

    p = fc2 @ relu(fc1 @ x_hat),   x_hat = x / rms(x)

Training on RMS-normalised inputs changes no decision at threshold 0, because p is positively
homogeneous in x. The loss is the plain, calibrated binary cross entropy; which point of the
recall-sparsity curve to use is chosen afterwards by a cut.

PowerInfer's predictor has no bias. Here two of the R hidden units are one: their weights +u and -u
stay as they are, so relu(u x) + relu(-u x) = |u x|, with u the least-squares solution of
u x_hat = 1 over the training tokens. The residual stream of a trained transformer has directions
that hardly change from token to token, so b(x) = |u x| is close to constant, and at threshold 0

    p(x) - c b(x) >= 0   <=>   p(x) / b(x) >= c   (b > 0)

is a cut at c of either sign, exact by construction, folded into the two units' columns of fc2.

Shape letters: L layers, B batch, D hidden, F FFN width, R rank, P packed width.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from sparsecast.collect.bits import unpack
from sparsecast.predictors.bias import fold
from sparsecast.predictors.config import DEFAULT_RECALL, TrainConfig
from sparsecast.predictors.data import LayersBatch
from sparsecast.predictors.metrics import ScoreHistogram
from sparsecast.predictors.mlp import Predictor, rms_normalised
from sparsecast.predictors.warm_start import WarmStart


class PredictorModule(L.LightningModule):
    """Stacked predictors; every layer keeps the weights of its own best epoch.

    Args:
        cfg: Objective and learning rate.
        start: Initial weights and the bias direction u of every layer.
    """

    bias_LD: Tensor

    def __init__(self, cfg: TrainConfig, start: WarmStart) -> None:
        super().__init__()
        self.cfg = cfg
        self.register_buffer("bias_LD", start.bias_LD)
        self.fc1_LRD = nn.Parameter(start.fc1_LRD)
        self.fc2_LFR = nn.Parameter(start.fc2_LFR)
        self.offset_LF = nn.Parameter(start.offset_LF)
        layers = len(start.bias_LD)
        self.best_score = [-1.0] * layers
        self._best: list[tuple[Tensor, Tensor, Tensor] | None] = [None] * layers
        self._histograms: list[ScoreHistogram] = []

    def forward(self, x_LBD: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (L, B, F) and b (L, B, 1), both for RMS-normalised inputs."""
        hidden_LBR = torch.bmm(x_LBD, self.fc1_LRD.transpose(1, 2)).relu()
        bias_LB1 = torch.bmm(x_LBD, self.bias_LD.unsqueeze(-1)).abs()
        logits = torch.baddbmm(
            bias_LB1 * self.offset_LF.unsqueeze(1), hidden_LBR, self.fc2_LFR.transpose(1, 2)
        )
        return logits, bias_LB1

    def training_step(self, batch: LayersBatch, _: int) -> Tensor:
        logits_LBF, _bias = self(rms_normalised(batch.x_LBD))
        fired = unpack(batch.mask_LBP, logits_LBF.shape[-1]).to(logits_LBF.dtype)
        loss = nn.functional.binary_cross_entropy_with_logits(logits_LBF, fired)
        self.log("loss", loss.detach(), prog_bar=True)
        # Layers are independent: a sum over them gives each the step it would take alone.
        return loss * len(logits_LBF)

    def on_validation_epoch_start(self) -> None:
        self._histograms = [ScoreHistogram() for _ in range(len(self.bias_LD))]

    def validation_step(self, batch: LayersBatch, _: int) -> None:
        logits_LBF, bias_LB1 = self(rms_normalised(batch.x_LBD))
        fired_LBF = unpack(batch.mask_LBP, logits_LBF.shape[-1])
        ratio = logits_LBF.float() / bias_LB1.float().clamp_min(1e-6)
        for layer, histogram in enumerate(self._histograms):
            histogram.add(ratio[layer], fired_LBF[layer])

    def on_validation_epoch_end(self) -> None:
        scores = [self._objective(histogram) for histogram in self._histograms]
        for layer, score in enumerate(scores):
            if score > self.best_score[layer]:
                self.best_score[layer] = score
                self._best[layer] = (
                    self.fc1_LRD[layer].detach().cpu().clone(),
                    self.fc2_LFR[layer].detach().cpu().clone(),
                    self.offset_LF[layer].detach().cpu().clone(),
                )
        name = "sparsity at target" if self.cfg.target_sparsity is None else "recall at target"
        self.log(name, sum(scores) / len(scores), prog_bar=True)

    def _objective(self, histogram: ScoreHistogram) -> float:
        """The predicted sparsity at the stated recall, or the recall at the stated sparsity."""
        if self.cfg.target_sparsity is not None:
            return histogram.at(histogram.cut_for_sparsity(self.cfg.target_sparsity))[0]
        return histogram.at(histogram.cut_for_recall(self.cfg.target_recall or DEFAULT_RECALL))[1]

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(
            [
                {"params": [self.fc1_LRD, self.fc2_LFR], "weight_decay": 0.01},
                {"params": [self.offset_LF], "weight_decay": 0.0},
            ],
            lr=self.cfg.lr,
        )
        total = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.cfg.lr, total_steps=total, pct_start=0.1
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def predictors(self) -> list[Predictor]:
        """The best weights of every layer as PowerInfer's predictors, uncut."""
        return [
            fold(*best, self.bias_LD[layer].cpu())
            for layer, best in enumerate(self._best)
            if best is not None
        ]
