"""Operating points of rules under a limit on perplexity, for `sparsecast bench predictors`.

`train` chooses those of our recipe and of SVD. The public recipe and SparseInfer's signs have no
such choice of their own, so they are searched here in the same way and as closely: for the largest
share of misses on the calibration split that the calibration documents allow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from sparsecast.collect.store.store import ActivationStore
from sparsecast.core.models.perplexity import dense_perplexity, perplexity
from sparsecast.predictors.baselines.sparseinfer import SignRule, sign_nbytes, sign_scores
from sparsecast.predictors.baselines.svd import gate_of
from sparsecast.predictors.calibration.operating_point import most_misses, recorded_documents
from sparsecast.predictors.checkpoint import PredictorSet
from sparsecast.predictors.formats import share_of_ffn
from sparsecast.predictors.layer_data import layer_batches
from sparsecast.predictors.metrics import ScoreHistogram
from sparsecast.predictors.model_in_loop import Rule, rules_in_loop

FEWEST_MISSES = 1e-9
"""The smallest share of misses that is tried: next to none. Under one threshold for all layers few
misses may cost much, because they may all be those of one layer or of tokens with a large norm."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """The rules of all layers at one operating point."""

    rules: Sequence[Rule]
    threshold: float
    dtype: str
    rank: float | None
    """The mean over layers; None for a rule without one."""
    shares: Sequence[float]
    """Bytes of each layer's rule, relative to its FFN in f16."""


NotMet = float
"""In place of a `Point`: the change of perplexity at the fewest misses, above the limit."""

At = Callable[[float], Point]
"""The operating point of a share of misses on the calibration split."""


def point_of(predictors: PredictorSet, store: ActivationStore) -> Point:
    """Predictors at the threshold that they have."""
    layers, shape = predictors.layers, store.manifest.model_shape
    return Point(
        rules=layers,
        threshold=predictors.threshold,
        dtype=layers[0].dtype,
        rank=sum(layer.rank for layer in layers) / len(layers),
        shares=[share_of_ffn(layer.rank, layer.dtype, shape) for layer in layers],
    )


def common_thresholds(predictors: PredictorSet, store: ActivationStore, device: torch.device) -> At:
    """One threshold for all layers, as PowerInfer's file holds it."""
    histogram = ScoreHistogram()
    for layer, predictor in enumerate(predictors.layers):
        on_device = predictor.to(device)
        for x_TD, active_TF in layer_batches(store, "calibration", layer, device=device):
            histogram.add(on_device.logits(x_TD), active_TF)
    point = point_of(predictors, store)
    return lambda misses: replace(point, threshold=histogram.threshold_for_recall(1 - misses))


def sign_thresholds(model: PreTrainedModel, store: ActivationStore, device: torch.device) -> At:
    """SparseInfer's rule; every layer has the threshold that gives it the same recall.

    Memory: the signs of all gates in float32 on the device, and a `ScoreHistogram` a layer.
    """
    recorded = store.manifest
    signs = [gate_of(model, layer)[0].detach().sign().to(device) for layer in recorded.layers]
    scores = [sign_scores(sign_FD, store, layer) for layer, sign_FD in enumerate(signs)]
    ffn = recorded.ffn_matrices * recorded.hidden_size * recorded.ffn_width * 2

    def at(misses: float) -> Point:
        return Point(
            rules=[
                SignRule(sign_FD, histogram.threshold_for_recall(1 - misses))
                for sign_FD, histogram in zip(signs, scores, strict=True)
            ],
            threshold=0.0,
            dtype="1 bit",
            rank=None,
            shares=[sign_nbytes(store) / ffn] * len(signs),
        )

    return at


class Search:
    """Searches points whose change of perplexity on the calibration documents is within a limit."""

    def __init__(self, model: PreTrainedModel, store: ActivationStore, limit: float) -> None:
        self._model = model
        self._documents = recorded_documents(store)
        self._dense = dense_perplexity(model, self._documents)
        self._limit = limit

    def most_misses(self, at: At) -> Point | NotMet:
        """The point of the largest share of misses, see `most_misses` of the calibration."""
        kept: list[Point] = []

        def change(misses: float) -> float:
            point = at(misses)
            with rules_in_loop(self._model, point.rules, point.threshold):
                value = perplexity(self._model, self._documents) / self._dense - 1
            if value <= self._limit:
                kept[:] = [point]
            return value

        closest = most_misses(change, self._limit, FEWEST_MISSES)
        return kept[0] if closest is None else closest
