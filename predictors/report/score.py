"""Score predictors on the held-out split, as stored and with the engine's rounding.

In a mixture of experts a token counts once for each expert that it was routed to. Counts are summed
over a layer's experts and divided once, so a busy expert weighs more; averages over layers are
plain means. Traffic is that of a token's experts: their predictors and neurons relative to their
dense FFNs. Other thresholds, and the area under curves, pool the scores of a layer's experts, each
in units of its own predictor's scale.

Shape letters: T tokens, D hidden, F FFN width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsecast.collect.store.store import ActivationStore, Manifest
from sparsecast.core.errors import InputError
from sparsecast.core.models.ffns import ffn_numbers, place_of
from sparsecast.core.progress import progress_bar
from sparsecast.predictors.baselines.sparseinfer import sign_nbytes, sign_rules
from sparsecast.predictors.checkpoint import PredictorSet
from sparsecast.predictors.layer_data import layer_batches, layer_energies, layer_positions
from sparsecast.predictors.metrics import (
    Counts,
    ScoreHistogram,
    TokenRecalls,
    Traffic,
    count,
    traffic_beside,
)
from sparsecast.predictors.predictor import Predictor, rms

SPLIT = "held-out"
BATCH = 1024
SCORES = (
    "recall",
    "recall_p5",
    "recall_first_token",
    "predicted_sparsity",
    "true_sparsity",
    "precision",
    "energy_recall",
    "roc_auc",
    "average_precision",
)
"""Scores beside the traffics, as keys of report.json."""

Rule = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Maps raw inputs (T, D) to the predicted neurons (T, F) and to scores (T, F) that rank them."""


@dataclass(frozen=True)
class LayerScore:
    """One layer's scores, under the keys of report.json, and its curve."""

    values: dict[str, Any]
    curve: list[tuple[float, float]]
    """(recall, predicted sparsity) as the threshold rises."""
    experts: list[dict[str, Any]]
    """The scores of each expert, in a mixture of experts."""


class RatedRule(NamedTuple):
    """A rule, the rank to report for it, and the bytes that it reads per token."""

    rule: Rule
    rank: int | None
    nbytes: int


def score_layers(predictors: PredictorSet, store: ActivationStore, where: str) -> list[LayerScore]:
    """Score every recorded layer; in a mixture of experts each layer's experts, and their sums.

    Memory: `BATCH` tokens of one layer, and one layer's `ScoreHistogram` and `TokenRecalls`,
    for any number of tokens; of a mixture, one expert's as well.

    Raises:
        InputError: The store has a layer that `predictors` lack.
    """
    layers, experts = store.manifest.layers, store.manifest.experts
    if max(store.manifest.ffns) >= len(predictors.layers):
        raise InputError(
            f"{where}: has predictors for {len(predictors.layers) // max(1, experts)} layers, but "
            f"the activations include layer {max(layers)}; give the predictors of this model"
        )

    def rule_of(ffn: int) -> RatedRule:
        predictor = predictors.layers[ffn]
        rule = _rule(predictor, predictors.threshold)
        return RatedRule(rule, predictor.rank, predictor.nbytes)

    return _score_each(rule_of, store, "report")


def _score_each(
    rule_of: Callable[[int], RatedRule], store: ActivationStore, title: str
) -> list[LayerScore]:
    """Score every layer by the rules of its FFNs, asked for in order."""
    scores, manifest = [], store.manifest
    with progress_bar(title, len(manifest.ffns)) as progress:
        for layer in manifest.layers:
            total, experts = None, []
            for ffn in ffn_numbers([layer], manifest.experts):
                own = add_up(rule_of(ffn), store, ffn)
                _, expert = place_of(ffn, manifest.experts)
                if expert is not None:
                    names = {"layer": layer, "expert": expert, "tokens": own.rows}
                    experts.append({**names, **_values(own, manifest)})
                total = own if total is None else total.plus(own)
                progress.advance()
            assert total is not None
            values = {"layer": layer, **_values(total, manifest)}
            scores.append(LayerScore(values, total.histogram.curve(), experts))
    return scores


def score_sign(model: str, predictors: PredictorSet, store: ActivationStore) -> list[LayerScore]:
    """Score SparseInfer's rule on every recorded layer; see `sign_rules`."""
    rules = sign_rules(model, predictors, store)
    nbytes = sign_nbytes(store)
    return _score_each(lambda _: RatedRule(next(rules), None, nbytes), store, "sign")


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


@dataclass
class Sums:
    """What is counted of one FFN, or of all experts of a layer."""

    counts: Counts
    first: Counts
    """Of the first tokens of documents."""
    tokens: TokenRecalls
    histogram: ScoreHistogram
    hit: float
    """Energy of the entries that are predicted, and of all."""
    energy: float
    ranks: list[int | None]
    nbytes: int
    """Bytes that the rules read, over all rows."""
    rows: int

    def plus(self, other: Sums) -> Sums:
        """Add other tokens, in place where that is large."""
        self.tokens.tokens += other.tokens.tokens
        self.histogram.plus(other.histogram)
        return Sums(
            self.counts.plus(other.counts),
            self.first.plus(other.first),
            self.tokens,
            self.histogram,
            self.hit + other.hit,
            self.energy + other.energy,
            self.ranks + other.ranks,
            self.nbytes + other.nbytes,
            self.rows + other.rows,
        )


def add_up(rated: RatedRule, store: ActivationStore, ffn: int) -> Sums:
    """Count one FFN's rule over the held-out split."""
    histogram, tokens = ScoreHistogram(), TokenRecalls()
    counts = first = Counts(0, 0, 0, 0)
    hit = energy = 0.0
    rows = 0
    runs = zip(
        layer_batches(store, SPLIT, ffn, BATCH),
        layer_energies(store, SPLIT, ffn, BATCH),
        layer_positions(store, SPLIT, ffn, BATCH),
        strict=True,
    )
    for (x_TD, active_TF), energy_TF, position_T in runs:
        predicted_TF, score_TF = rated.rule(x_TD)
        counts = counts.plus(count(predicted_TF, active_TF))
        tokens.add(predicted_TF, active_TF)
        first_T = position_T == 0
        first = first.plus(count(predicted_TF[first_T], active_TF[first_T]))
        if energy_TF is not None:
            hit += (energy_TF * predicted_TF).sum(dtype=torch.float64).item()
            energy += energy_TF.sum(dtype=torch.float64).item()
        histogram.add(score_TF, active_TF)
        rows += len(x_TD)
    nbytes = rated.nbytes * rows
    return Sums(counts, first, tokens, histogram, hit, energy, [rated.rank], nbytes, rows)


def _values(sums: Sums, manifest: Manifest) -> dict[str, Any]:
    """Scores under the keys of report.json; all but the rank None without a row."""
    counts, ranks = sums.counts, [rank for rank in sums.ranks if rank is not None]
    rank = sum(ranks) / len(ranks) if ranks else None
    values: dict[str, Any] = {"rank": int(rank) if rank is not None and rank % 1 == 0 else rank}
    if not sums.rows:
        return values | dict.fromkeys(SCORES + Traffic._fields)
    ffn = manifest.ffn_matrices * manifest.hidden_size * manifest.ffn_width * 2
    energy_recall = sums.hit / sums.energy if sums.energy else 1.0
    return values | {
        "recall": counts.recall,
        "recall_p5": sums.tokens.percentile(5),
        "recall_first_token": sums.first.recall if sums.first.total else None,
        "predicted_sparsity": counts.predicted_sparsity,
        "true_sparsity": counts.true_sparsity,
        "precision": counts.precision,
        "energy_recall": energy_recall if manifest.energy else None,
        "roc_auc": sums.histogram.roc_auc(),
        "average_precision": sums.histogram.average_precision(),
        **traffic_beside(
            sums.nbytes / sums.rows / ffn,
            matrices=manifest.ffn_matrices,
            recall=counts.recall,
            predicted_sparsity=counts.predicted_sparsity,
            true_sparsity=counts.true_sparsity,
        )._asdict(),
    }


def _size(predictor: Predictor) -> float:
    """Scale of a predictor's logits; dividing by it keeps them within a histogram's octaves."""
    fc1, fc2 = (float(weight.double().norm()) for weight in predictor.weights)
    return fc1 * fc2 or 1.0
