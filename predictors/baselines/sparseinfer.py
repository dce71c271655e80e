"""SparseInfer's sign rule (arXiv 2411.12692): a baseline without training, for reports alone.

The sign of a product follows from the signs of its factors, so of gate row w_j and the FFN's
normalized input x' the rule counts the signs that agree, less those that do not:

    score_j = sum_i sign(w_ji) sign(x'_i),    active where score_j >= c

The norm's weight goes into w (svd.py, `gate_of`), and the size of what is left of x' decides
nothing, so x may be the residual before the norm. c is one number a layer, calibrated like any
other cut; one bit a gate weight is read.

PowerInfer's format is two matrices with a ReLU between them and nothing that takes the sign of an
input, so this rule cannot be written in it: it is scored, and never exported.

Shape letters: T tokens, D hidden, F FFN width.
"""

from __future__ import annotations

from torch import Tensor

from sparsecast.collect.store.store import ActivationStore
from sparsecast.core.progress import progress_bar
from sparsecast.predictors.baselines.svd import gate_of
from sparsecast.predictors.checkpoint import PredictorSet
from sparsecast.predictors.metrics import Counts, ScoreHistogram, count
from sparsecast.predictors.predictor import Predictor
from sparsecast.predictors.recorded_model import load_recorded
from sparsecast.predictors.report.score import LayerScore, Rule, score_layer
from sparsecast.predictors.training.data import layer_batches

CALIBRATION = "calibration"


def sign_nbytes(store: ActivationStore) -> int:
    """What the rule reads per layer: one bit a gate weight."""
    return store.manifest.hidden_size * store.manifest.ffn_width // 8


def score_sign(model: str, predictors: PredictorSet, store: ActivationStore) -> list[LayerScore]:
    """Score the rule on every recorded layer, each at the recall that its predictor of `predictors`
    has on the calibration split.

    Memory: the model, and what `score_layers` takes.

    Raises:
        InputError: See `load_model`.
    """
    made, scores = store.manifest, []
    loaded = load_recorded(model, store, "cpu")
    with progress_bar("sign", len(made.layers)) as progress:
        for layer in made.layers:
            sign_FD = gate_of(loaded, layer)[0].sign()
            recall = _recall(predictors.layers[layer], predictors.threshold, store, layer)
            rule = sign_rule(sign_FD, calibrated_cut(sign_FD, store, layer, recall))
            scores.append(score_layer(rule, store, layer, rank=None, nbytes=sign_nbytes(store)))
            progress.advance()
    return scores


def sign_rule(sign_FD: Tensor, cut: float) -> Rule:
    """From the signs of the gate, float32."""

    def rule(x_TD: Tensor) -> tuple[Tensor, Tensor]:
        score_TF = agreement(sign_FD, x_TD)
        return score_TF >= cut, score_TF

    return rule


def agreement(sign_FD: Tensor, x_TD: Tensor) -> Tensor:
    """Signs that agree less signs that do not, (T, F): whole numbers, exact in float32."""
    return x_TD.float().sign() @ sign_FD.T


def calibrated_cut(sign_FD: Tensor, store: ActivationStore, layer: int, recall: float) -> float:
    """The largest cut that has at least this recall on the calibration split."""
    histogram = ScoreHistogram()
    for x_TD, active_TF in layer_batches(store, CALIBRATION, layer):
        histogram.add(agreement(sign_FD, x_TD), active_TF)
    return histogram.cut_for_recall(recall)


def _recall(predictor: Predictor, threshold: float, store: ActivationStore, layer: int) -> float:
    counts = Counts(0, 0, 0, 0)
    for x_TD, active_TF in layer_batches(store, CALIBRATION, layer):
        counts = counts.plus(count(predictor.logits(x_TD) >= threshold, active_TF))
    return counts.recall
