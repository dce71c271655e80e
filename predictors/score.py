"""Score predictors on the held-out split, as exported and with the engine's rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sparsecast.collect.errors import InputError
from sparsecast.collect.progress import bar
from sparsecast.collect.store import ActivationStore
from sparsecast.predictors.checkpoint import PredictorSet
from sparsecast.predictors.data import layer_batches, layer_energies
from sparsecast.predictors.metrics import Counts, ScoreHistogram, count, traffic
from sparsecast.predictors.mlp import Predictor, rms

SPLIT = "held-out"


@dataclass(frozen=True)
class LayerScore:
    """One layer: the JSON keys of the report, and its curve."""

    values: dict[str, Any]
    curve: list[tuple[float, float]]
    """(recall, predicted sparsity) as the threshold rises."""


def score_layers(predictors: PredictorSet, store: ActivationStore, where: str) -> list[LayerScore]:
    """Score every recorded layer.

    Memory: 1,024 tokens of one layer at a time.

    Raises:
        InputError: The store has a layer that `predictors` lack.
    """
    layers = store.manifest.layers
    if max(layers) >= len(predictors.layers):
        raise InputError(
            f"{where}: has predictors for {len(predictors.layers)} layers, but the activations "
            f"are of layer {max(layers)} too; give the predictors of this model"
        )
    scores = []
    with bar("report", len(layers)) as progress:
        for layer in layers:
            scores.append(_score(predictors.layers[layer], predictors.threshold, store, layer))
            progress.advance()
    return scores


def _score(
    predictor: Predictor, threshold: float, store: ActivationStore, layer: int
) -> LayerScore:
    made = store.manifest
    histogram = ScoreHistogram()
    counts = Counts(0, 0, 0, 0)
    hit = energy = 0.0
    pairs = zip(
        layer_batches(store, SPLIT, layer), layer_energies(store, SPLIT, layer), strict=True
    )
    for (x_TD, active_TF), energy_TF in pairs:
        logits_TF = predictor.logits(x_TD)
        predicted_TF = logits_TF >= threshold
        counts = counts.plus(count(predicted_TF, active_TF))
        if energy_TF is not None:
            hit += (energy_TF * predicted_TF).sum(dtype=torch.float64).item()
            energy += energy_TF.sum(dtype=torch.float64).item()
        # At threshold 0 the norm of x decides nothing, so it must not rank one token over another.
        ranked_TF = logits_TF / rms(x_TD) if threshold == 0 else logits_TF
        histogram.add(ranked_TF, active_TF)
    bytes_read = traffic(
        rank=predictor.rank,
        hidden_size=made.hidden_size,
        ffn_width=made.ffn_width,
        matrices=made.ffn_matrices,
        recall=counts.recall,
        predicted_sparsity=counts.predicted_sparsity,
        true_sparsity=counts.true_sparsity,
    )
    values = {
        "layer": layer,
        "rank": predictor.rank,
        "recall": counts.recall,
        "predicted_sparsity": counts.predicted_sparsity,
        "true_sparsity": counts.true_sparsity,
        "precision": counts.precision,
        "energy_recall": (hit / energy if energy else 1.0) if made.energy else None,
        "roc_auc": histogram.roc_auc(),
        **bytes_read._asdict(),
    }
    return LayerScore(values, histogram.curve())
