"""SparseInfer's sign rule (arXiv 2411.12692), a baseline without training.

The sign of a product follows from the signs of its factors. For gate row w_j and the FFN's
normalized input x', the rule counts the signs that agree minus those that differ:

    score_j = sum_i sign(w_ji) sign(x'_i),    active where score_j >= c

The norm's weight is folded into w (svd.py, `gate_of`). The remaining scale does not change signs,
so x may be the residual before the norm. The threshold c is calibrated per layer; the rule reads
one bit per gate weight.

Reports score this rule, but it cannot be exported: PowerInfer's format, two matrices with a ReLU
between them, cannot take the sign of an input.

Shape letters: T tokens, D hidden, F FFN width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from sparsecast.collect.store.store import ActivationStore
from sparsecast.predictors.baselines.svd import gate_of
from sparsecast.predictors.checkpoint import PredictorSet
from sparsecast.predictors.layer_data import layer_batches
from sparsecast.predictors.metrics import Counts, ScoreHistogram, count
from sparsecast.predictors.predictor import Predictor
from sparsecast.predictors.recorded_model import load_recorded

CALIBRATION = "calibration"


@dataclass(frozen=True, eq=False)
class SignRule:
    """The rule of one layer in place of a predictor: logits are scores minus c."""

    sign_FD: Tensor
    threshold: float

    def to(self, device: torch.device) -> SignRule:
        return replace(self, sign_FD=self.sign_FD.to(device))

    def logits(self, x_TD: Tensor) -> Tensor:
        return agreement(self.sign_FD, x_TD) - self.threshold


def sign_nbytes(store: ActivationStore) -> int:
    """Bytes that the rule reads per layer: one bit per gate weight."""
    return store.manifest.hidden_size * store.manifest.ffn_width // 8


def sign_rules(
    model: str, predictors: PredictorSet, store: ActivationStore
) -> Iterator[Callable[[Tensor], tuple[Tensor, Tensor]]]:
    """Calibrate the rule of every recorded layer to the recall that the layer's predictor has on
    the calibration split.

    Memory: the model and one layer's gate.

    Yields:
        A function from raw inputs (T, D) to the predicted neurons (T, F) and their scores (T, F).

    Raises:
        InputError: See `load_model`.
    """
    loaded = load_recorded(model, store, "cpu")
    for layer in store.manifest.ffns:
        sign_FD = gate_of(loaded, layer)[0].sign()
        recall = _recall(predictors.layers[layer], predictors.threshold, store, layer)
        yield partial(_apply, sign_FD, calibrated_threshold(sign_FD, store, layer, recall))


def _apply(sign_FD: Tensor, threshold: float, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    score_TF = agreement(sign_FD, x_TD)
    return score_TF >= threshold, score_TF


def agreement(sign_FD: Tensor, x_TD: Tensor) -> Tensor:
    """Count signs that agree minus signs that differ: (..., F), whole numbers, exact in float32."""
    return x_TD.float().sign() @ sign_FD.T


def calibrated_threshold(
    sign_FD: Tensor, store: ActivationStore, layer: int, recall: float
) -> float:
    """The largest threshold that reaches a recall on the calibration split."""
    return sign_scores(sign_FD, store, layer).threshold_for_recall(recall)


def sign_scores(sign_FD: Tensor, store: ActivationStore, layer: int) -> ScoreHistogram:
    """Scores of one layer on the calibration split, counted where the signs are."""
    histogram = ScoreHistogram()
    for x_TD, active_TF in layer_batches(store, CALIBRATION, layer, device=sign_FD.device):
        histogram.add(agreement(sign_FD, x_TD), active_TF)
    return histogram


def _recall(predictor: Predictor, threshold: float, store: ActivationStore, layer: int) -> float:
    """Recall of a predictor on the calibration split."""
    counts = Counts(0, 0, 0, 0)
    for x_TD, active_TF in layer_batches(store, CALIBRATION, layer):
        counts = counts.plus(count(predictor.logits(x_TD) >= threshold, active_TF))
    return counts.recall
