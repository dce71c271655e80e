"""The scores that `sparsecast bench predictors` compares, on held-out tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from sparsecast.collect.store.store import ActivationStore
from sparsecast.core.errors import InputError
from sparsecast.core.models.loading import pick_device
from sparsecast.core.models.perplexity import perplexity
from sparsecast.predictors.calibration.bias import bias_of
from sparsecast.predictors.calibration.calibrate import constant_combination
from sparsecast.predictors.calibration.operating_point import recorded_documents
from sparsecast.predictors.checkpoint import PredictorSet
from sparsecast.predictors.formats import BITS
from sparsecast.predictors.layer_data import layer_batches
from sparsecast.predictors.metrics import Counts, ScoreHistogram, count, traffic
from sparsecast.predictors.model_in_loop import predictors_in_loop
from sparsecast.predictors.recorded_model import load_recorded

HELD_OUT = "held-out"
LOWEST, HIGHEST = -64.0, 16.0
"""Range of thresholds that are tried for the public recipe's predictors."""
BISECTIONS = 14
"""Steps of the search in that range."""


def mean_scores(counts: list[Counts]) -> dict[str, float]:
    """The mean over layers of what the counts give."""
    names = ("recall", "predicted_sparsity", "true_sparsity", "precision")
    return {name: sum(getattr(c, name) for c in counts) / len(counts) for name in names}


def count_layers(
    predictors: PredictorSet, store: ActivationStore, split: str = HELD_OUT
) -> list[Counts]:
    """Per layer, hits and misses at the predictors' own threshold."""
    found = []
    for layer in store.manifest.layers:
        total = Counts(0, 0, 0, 0)
        for x_TD, active_TF in layer_batches(store, split, layer):
            logits_TF = predictors.layers[layer].logits(x_TD)
            total = total.plus(count(logits_TF >= predictors.threshold, active_TF))
        found.append(total)
    return found


def misses(
    predictors: PredictorSet, reference: list[Counts], store: ActivationStore
) -> dict[str, Any]:
    """Recall of ours where each layer skips exactly what the public recipe skips there."""
    recalls = []
    for layer, theirs in enumerate(reference):
        predictor, histogram = predictors.layers[layer], ScoreHistogram()
        constant_R = constant_combination(predictor, store, layer)
        for x_TD, active_TF in layer_batches(store, HELD_OUT, layer):
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


def _ratio(ours: float, theirs: float) -> float | None:
    """None if the reference misses nothing."""
    return ours / theirs if theirs else None


def at_perplexity(
    source: str,
    device: str,
    allowed: float,
    store: ActivationStore,
    reference: PredictorSet,
    ours: PredictorSet,
) -> dict[str, Any]:
    """Traffic of both at a change of perplexity of at most `allowed`, and the change on held-out.

    Args:
        source: The recorded model.
        reference: The public recipe's predictors; their one threshold is chosen here, on the
            calibration documents.
        ours: Trained for that change.
    """
    model = load_recorded(source, store, pick_device(device))
    held_out = recorded_documents(store, HELD_OUT)
    reference = replace(reference, threshold=_threshold(model, allowed, store, reference))
    dense = perplexity(model, held_out)
    result: dict[str, Any] = {"limit": allowed}
    for name, predictors in (("reference", reference), ("ours", ours)):
        counts = count_layers(predictors, store)
        with predictors_in_loop(model, predictors):
            change = perplexity(model, held_out) / dense - 1
        result[name] = {
            "dtype": predictors.layers[0].dtype,
            "rank": sum(layer.rank for layer in predictors.layers) / len(predictors.layers),
            "threshold": predictors.threshold,
            "held_out_change": change,
            **mean_scores(counts),
            **_mean_traffic(predictors, counts, store),
        }
    result["traffic_ratio"] = result["ours"]["traffic"] / result["reference"]["traffic"]
    result["cascade_ratio"] = result["ours"]["cascade"] / result["reference"]["cascade"]
    result["over_oracle"] = result["ours"]["traffic"] / result["ours"]["oracle"]
    return result


def _threshold(
    model: PreTrainedModel, allowed: float, store: ActivationStore, predictors: PredictorSet
) -> float:
    """The highest threshold that keeps perplexity on the calibration documents within `allowed`."""
    documents = recorded_documents(store)
    limit = (1 + allowed) * perplexity(model, documents)

    def fits(threshold: float) -> bool:
        with predictors_in_loop(model, replace(predictors, threshold=threshold)):
            return perplexity(model, documents) <= limit

    if not fits(LOWEST):
        raise InputError(
            f"--perplexity: the reference changes it by more than {allowed:.3%} even at a "
            f"threshold of {LOWEST:g}; allow more"
        )
    low, high = LOWEST, HIGHEST
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _mean_traffic(
    predictors: PredictorSet, counts: list[Counts], store: ActivationStore
) -> dict[str, float]:
    rows = [
        traffic(
            rank=predictor.rank,
            hidden_size=store.manifest.hidden_size,
            ffn_width=store.manifest.ffn_width,
            matrices=store.manifest.ffn_matrices,
            recall=c.recall,
            predicted_sparsity=c.predicted_sparsity,
            true_sparsity=c.true_sparsity,
            predictor_bits=BITS[predictor.dtype],
        )._asdict()
        for predictor, c in zip(predictors.layers, counts, strict=True)
    ]
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
