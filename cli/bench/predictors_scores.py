"""The scores that `sparsecast bench predictors` compares, on held-out tokens.

Counts are summed over the tokens of a layer; scores are plain means over layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from sparsecast.cli.bench.predictors_points import NotMet, Point
from sparsecast.collect.store.store import ActivationStore
from sparsecast.core.models.perplexity import dense_perplexity, perplexity
from sparsecast.predictors.calibration.bias import bias_of
from sparsecast.predictors.calibration.calibrate import constant_combination
from sparsecast.predictors.calibration.operating_point import recorded_documents
from sparsecast.predictors.checkpoint import PredictorSet
from sparsecast.predictors.layer_data import layer_batches
from sparsecast.predictors.metrics import Counts, ScoreHistogram, Traffic, count, traffic_beside
from sparsecast.predictors.model_in_loop import Rule, rules_in_loop

HELD_OUT = "held-out"
SCORES = ("recall", "predicted_sparsity", "true_sparsity", "precision")
OURS = "ours"


def mean_scores(counts: Sequence[Counts]) -> dict[str, float]:
    """The mean over layers of what the counts give."""
    return {name: sum(getattr(c, name) for c in counts) / len(counts) for name in SCORES}


def count_layers(
    rules: Sequence[Rule], threshold: float, store: ActivationStore, device: torch.device
) -> list[Counts]:
    """Per layer, hits and misses on the held-out split where logits reach a threshold."""
    found = []
    for layer, rule in enumerate(rules):
        total, on_device = Counts(0, 0, 0, 0), rule.to(device)
        for x_TD, active_TF in layer_batches(store, HELD_OUT, layer, device=device):
            total = total.plus(count(on_device.logits(x_TD) >= threshold, active_TF))
        found.append(total)
    return found


def misses(
    predictors: PredictorSet,
    reference: Sequence[Counts],
    store: ActivationStore,
    device: torch.device,
) -> dict[str, Any]:
    """Recall of ours where each layer skips exactly what the public recipe skips there."""
    recalls = []
    for layer, theirs in enumerate(reference):
        predictor, histogram = predictors.layers[layer].to(device), ScoreHistogram()
        constant_R = constant_combination(predictor, store, layer)
        for x_TD, active_TF in layer_batches(store, HELD_OUT, layer, device=device):
            score_TF = predictor.logits(x_TD) / bias_of(predictor, constant_R, x_TD)
            histogram.add(score_TF, active_TF)
        recalls.append(histogram.at(histogram.threshold_for_sparsity(theirs.predicted_sparsity))[0])
    ours = [1 - recall for recall in recalls]
    theirs_missed = [1 - counts.recall for counts in reference]
    return {
        "dtype": predictors.layers[0].dtype,
        "rank": predictors.layers[0].rank,
        "bytes": predictors.nbytes,
        "recall": sum(recalls) / len(recalls),
        "miss_ratio": _ratio(sum(ours), sum(theirs_missed)),
        "miss_ratio_layers": [_ratio(a, b) for a, b in zip(ours, theirs_missed, strict=True)],
    }


class HeldOut:
    """Scores points on the held-out split of a store, with the recorded model.

    Raises:
        InputError: See `dense_perplexity`.
    """

    def __init__(self, model: PreTrainedModel, store: ActivationStore) -> None:
        self._model = model
        self._store = store
        self._documents = recorded_documents(store, HELD_OUT)
        self._dense = dense_perplexity(model, self._documents)

    def score(self, point: Point | NotMet) -> dict[str, Any]:
        """Change of perplexity, counts and traffic of one point; all but two null if there is
        none."""
        if isinstance(point, NotMet):
            numbers = ("dtype", "rank", "threshold", "held_out_change", *SCORES, *Traffic._fields)
            return {"met": False, "closest_change": point, **dict.fromkeys(numbers)}
        counts = count_layers(point.rules, point.threshold, self._store, self._model.device)
        with rules_in_loop(self._model, point.rules, point.threshold):
            change = perplexity(self._model, self._documents) / self._dense - 1
        return {
            "met": True,
            "closest_change": None,
            "dtype": point.dtype,
            "rank": point.rank,
            "threshold": point.threshold,
            "held_out_change": change,
            **mean_scores(counts),
            **_mean_traffic(point, counts, self._store),
        }


def compared(limit: float, rows: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The rows of one table with what ours takes relative to the others."""
    ours, reference = rows[OURS], rows["reference"]
    return {
        "limit": limit,
        **rows,
        "traffic_ratio": _ratio(ours["traffic"], reference["traffic"]),
        "cascade_ratio": _ratio(ours["cascade"], reference["cascade"]),
        "over_oracle": _ratio(ours["traffic"], ours["oracle"]),
        "traffic_over": {
            name: _ratio(ours["traffic"], row["traffic"])
            for name, row in rows.items()
            if name != OURS
        },
    }


def _ratio(ours: float | None, theirs: float | None) -> float | None:
    """None if the other is zero, as where the reference misses nothing, or one was not met."""
    return ours / theirs if ours is not None and theirs else None


def _mean_traffic(
    point: Point, counts: Sequence[Counts], store: ActivationStore
) -> dict[str, float]:
    rows = [
        traffic_beside(
            share,
            matrices=store.manifest.ffn_matrices,
            recall=c.recall,
            predicted_sparsity=c.predicted_sparsity,
            true_sparsity=c.true_sparsity,
        )._asdict()
        for share, c in zip(point.shares, counts, strict=True)
    ]
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
