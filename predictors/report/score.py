"""Score predictors on the held-out split, as stored and with the engine's rounding.

Shape letters: T tokens, D hidden, F FFN width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsecast.collect.store.store import ActivationStore
from sparsecast.core.errors import InputError
from sparsecast.core.progress import progress_bar
from sparsecast.predictors.baselines.sparseinfer import sign_nbytes, sign_rules
from sparsecast.predictors.checkpoint import PredictorSet
from sparsecast.predictors.layer_data import layer_batches, layer_energies
from sparsecast.predictors.metrics import (
    Counts,
    ScoreHistogram,
    TokenRecalls,
    count,
    traffic_beside,
)
from sparsecast.predictors.predictor import Predictor, rms

SPLIT = "held-out"
BATCH = 1024

Rule = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Maps raw inputs (T, D) to the predicted neurons (T, F) and to scores (T, F) that rank them."""


@dataclass(frozen=True)
class LayerScore:
    """One layer's scores, under the keys of report.json, and its curve."""

    values: dict[str, Any]
    curve: list[tuple[float, float]]
    """(recall, predicted sparsity) as the threshold rises."""


def score_layers(predictors: PredictorSet, store: ActivationStore, where: str) -> list[LayerScore]:
    """Score every recorded layer.

    Memory: `BATCH` tokens of one layer, and one layer's `ScoreHistogram` and `TokenRecalls`,
    for any number of tokens.

    Raises:
        InputError: The store has a layer that `predictors` lack.
    """
    layers = store.manifest.layers
    if max(layers) >= len(predictors.layers):
        raise InputError(
            f"{where}: has predictors for {len(predictors.layers)} layers, but the activations "
            f"include layer {max(layers)}; give the predictors of this model"
        )
    scores = []
    with progress_bar("report", len(layers)) as progress:
        for layer in layers:
            predictor = predictors.layers[layer]
            rule = _rule(predictor, predictors.threshold)
            scores.append(
                score_layer(rule, store, layer, rank=predictor.rank, nbytes=predictor.nbytes)
            )
            progress.advance()
    return scores


def score_sign(model: str, predictors: PredictorSet, store: ActivationStore) -> list[LayerScore]:
    """Score SparseInfer's rule on every recorded layer; see `sign_rules`."""
    layers, scores = store.manifest.layers, []
    with progress_bar("sign", len(layers)) as progress:
        for layer, rule in zip(layers, sign_rules(model, predictors, store), strict=True):
            scores.append(score_layer(rule, store, layer, rank=None, nbytes=sign_nbytes(store)))
            progress.advance()
    return scores


def means(scores: Sequence[LayerScore]) -> dict[str, float | None]:
    """Plain means over the layers that have a number; None under `layer`."""
    mean: dict[str, float | None] = {}
    for name in scores[0].values:
        known = [v for score in scores if (v := score.values[name]) is not None]
        mean[name] = sum(known) / len(known) if known else None
    mean["layer"] = None
    return mean


def times_oracle(mean: dict[str, Any]) -> float | None:
    """Mean traffic relative to the oracle's; None if nothing fired."""
    return mean["traffic"] / mean["oracle"] if mean["oracle"] else None


def _rule(predictor: Predictor, threshold: float) -> Rule:
    size = _size(predictor)

    def rule(x_TD: Tensor) -> tuple[Tensor, Tensor]:
        logits_TF = predictor.logits(x_TD)
        # At threshold 0 decisions ignore the norm of x, so it must not rank tokens.
        norm = rms(x_TD) if threshold == 0 else 1.0
        return logits_TF >= threshold, logits_TF / (norm * size)

    return rule


def score_layer(
    rule: Rule, store: ActivationStore, layer: int, *, rank: int | None, nbytes: int
) -> LayerScore:
    """Score one layer's rule.

    Args:
        rank: Rank to report.
        nbytes: Bytes that the rule reads per token.
    """
    manifest = store.manifest
    histogram, tokens = ScoreHistogram(), TokenRecalls()
    counts = first = Counts(0, 0, 0, 0)
    hit = energy = 0.0
    runs = zip(
        layer_batches(store, SPLIT, layer, BATCH),
        layer_energies(store, SPLIT, layer, BATCH),
        _positions(store),
        strict=True,
    )
    for (x_TD, active_TF), energy_TF, position_T in runs:
        predicted_TF, score_TF = rule(x_TD)
        counts = counts.plus(count(predicted_TF, active_TF))
        tokens.add(predicted_TF, active_TF)
        first_T = position_T == 0
        first = first.plus(count(predicted_TF[first_T], active_TF[first_T]))
        if energy_TF is not None:
            hit += (energy_TF * predicted_TF).sum(dtype=torch.float64).item()
            energy += energy_TF.sum(dtype=torch.float64).item()
        histogram.add(score_TF, active_TF)
    values = {
        "layer": layer,
        "rank": rank,
        "recall": counts.recall,
        "recall_p5": tokens.percentile(5),
        "recall_first_token": first.recall if first.total else None,
        "predicted_sparsity": counts.predicted_sparsity,
        "true_sparsity": counts.true_sparsity,
        "precision": counts.precision,
        "energy_recall": (hit / energy if energy else 1.0) if manifest.energy else None,
        "roc_auc": histogram.roc_auc(),
        "average_precision": histogram.average_precision(),
        **traffic_beside(
            nbytes / (manifest.ffn_matrices * manifest.hidden_size * manifest.ffn_width * 2),
            matrices=manifest.ffn_matrices,
            recall=counts.recall,
            predicted_sparsity=counts.predicted_sparsity,
            true_sparsity=counts.true_sparsity,
        )._asdict(),
    }
    return LayerScore(values, histogram.curve())


def _size(predictor: Predictor) -> float:
    """Scale of a predictor's logits; dividing by it keeps them within a histogram's octaves."""
    fc1, fc2 = (float(weight.double().norm()) for weight in predictor.weights)
    return fc1 * fc2 or 1.0


def _positions(store: ActivationStore) -> Iterator[Tensor]:
    """Position in its document of each token (T,), for each batch of `layer_batches`."""
    for shard in range(len(store.shards(SPLIT))):
        _, position_T = store.tokens(SPLIT, shard)
        for start in range(0, len(position_T), BATCH):
            yield position_T[start : start + BATCH]
