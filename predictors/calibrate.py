"""Choose each layer's operating point on the calibration split, with the weights as exported.

Shape letters: T tokens, D hidden, F FFN width.
"""

from __future__ import annotations

from sparsecast.collect.store import ActivationStore
from sparsecast.predictors.bias import bias_of, shift
from sparsecast.predictors.config import DEFAULT_RECALL, TrainConfig
from sparsecast.predictors.data import layer_batches
from sparsecast.predictors.metrics import Counts, ScoreHistogram, count
from sparsecast.predictors.mlp import Predictor


def calibrate(
    predictor: Predictor, store: ActivationStore, layer: int, cfg: TrainConfig
) -> tuple[Predictor, Counts]:
    """Cut one layer's predictor at the objective and round it to f16.

    Returns:
        The predictor to export, for threshold 0, and its counts on the calibration split.
    """
    histogram = ScoreHistogram()
    for x_TD, active_TF in layer_batches(store, "calibration", layer):
        ratio = predictor.logits(x_TD) / bias_of(predictor, x_TD).clamp_min(1e-6)
        histogram.add(ratio, active_TF)
    if cfg.target_sparsity is not None:
        cut = histogram.cut_for_sparsity(cfg.target_sparsity)
    else:
        cut = histogram.cut_for_recall(cfg.target_recall or DEFAULT_RECALL)
    shifted = shift(predictor, cut)
    exported = Predictor(shifted.fc1_RD.half(), shifted.fc2_FR.half())
    return exported, counts(exported, store, "calibration", layer, threshold=0.0)


def counts(
    predictor: Predictor, store: ActivationStore, split: str, layer: int, threshold: float
) -> Counts:
    """Counts over a whole split, decided as the engine decides."""
    total = Counts(0, 0, 0, 0)
    for x_TD, active_TF in layer_batches(store, split, layer):
        total = total.plus(count(predictor.logits(x_TD) >= threshold, active_TF))
    return total
