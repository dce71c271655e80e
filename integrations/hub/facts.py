"""What the card says of a folder: the model, the scores, and on which text they were measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, NamedTuple

from sparsecast.collect.store.store import ActivationStore
from sparsecast.core.manifests import is_number
from sparsecast.core.models.activations import ActivationRule
from sparsecast.export.read.reader import GGUFFile
from sparsecast.predictors.checkpoint import PredictorSet
from sparsecast.predictors.formats import BITS
from sparsecast.predictors.metrics import traffic


class Measure(NamedTuple):
    """One number of the card, and of its model-index."""

    name: str
    type: str
    """The metric's id."""
    value: float
    corpus: str
    split: str


@dataclass
class Facts:
    """A folder, whole and intact, in the words and numbers of its card."""

    kind: str
    model: str | None
    """The model's name as the folder has it, which may be a path; None if it has none."""
    fingerprint: str | None
    """Of the model that the folder belongs to; of a sparse model its own."""
    activation: str
    shape: str
    """Layers and sizes in words."""
    corpora: list[str] = field(default_factory=list)
    """Names of the texts behind it, as the folder has them."""
    measures: list[Measure] = field(default_factory=list)
    layers: list[dict[str, float]] = field(default_factory=list)
    """Scores of every layer on the calibration split, under the names of the table's columns."""
    notes: list[str] = field(default_factory=list)


def predictor_facts(predictors: PredictorSet) -> Facts:
    """Describe predictors that have a manifest."""
    manifest = predictors.manifest
    assert manifest is not None
    experts = f", {manifest.experts} experts each" if manifest.experts else ""
    formats = "/".join(sorted({*manifest.dtypes}))
    corpus = str(manifest.recipe.get("corpus") or "the training corpus")
    facts = Facts(
        kind="predictors",
        model=manifest.model,
        fingerprint=manifest.fingerprint,
        activation=str(manifest.rule),
        shape=f"{predictors.layer_count} layers{experts}, hidden size {manifest.hidden_size}, FFN "
        f"{manifest.ffn_width}; ranks {_span(manifest.ranks)}; {formats}",
        corpora=[corpus] if manifest.recipe.get("corpus") else [],
    )
    rows = [_scores(predictors, number) for number in range(len(predictors.layers))]
    facts.layers = [] if manifest.experts else rows
    means = {name: fmean(row[name] for row in rows) for name in rows[0]}
    facts.measures = score_measures(means, corpus, "calibration")
    return facts


def _scores(predictors: PredictorSet, number: int) -> dict[str, float]:
    """Return the calibration of one layer or expert, with its traffic."""
    manifest = predictors.manifest
    assert manifest is not None
    scores, rank = manifest.calibration[number], manifest.ranks[number]
    costs = traffic(
        rank=rank,
        hidden_size=manifest.hidden_size,
        ffn_width=manifest.ffn_width,
        matrices=manifest.ffn_matrices,
        recall=scores["recall"],
        predicted_sparsity=scores["predicted_sparsity"],
        true_sparsity=scores.get("true_sparsity", scores["predicted_sparsity"]),
        predictor_bits=BITS[manifest.dtypes[number]],
    )
    row = {
        "rank": float(rank),
        "recall": scores["recall"],
        "predicted_sparsity": scores["predicted_sparsity"],
        "traffic": costs.traffic,
    }
    if "true_sparsity" in scores:
        row |= {"true_sparsity": scores["true_sparsity"], "exact": costs.exact}
    return row


LABELS = {
    "recall": "recall",
    "predicted_sparsity": "predicted sparsity",
    "true_sparsity": "true sparsity",
    "traffic": "FFN traffic with predictors",
    "exact": "FFN traffic of the exact path, without predictors",
}
"""Scores of predictors in words; all are means over layers."""
TYPES = {"exact": "exact_traffic"}
"""Metric ids that differ from the scores' names."""


def score_measures(means: dict[str, Any], corpus: str, split: str) -> list[Measure]:
    """Return the scores of `LABELS` that are numbers."""
    return [
        Measure(label, TYPES.get(name, name), float(means[name]), corpus, split)
        for name, label in LABELS.items()
        if is_number(means.get(name))
    ]


def store_facts(store: ActivationStore) -> Facts:
    """Describe activations by their statistics."""
    manifest, stats = store.manifest, store.stats()
    sparsity = {layer: stats.layer_sparsity(layer) for layer in manifest.layers}
    tokens = sum(sum(counts) for counts in manifest.shard_tokens.values())
    experts = f", {manifest.experts} experts each" if manifest.experts else ""
    return Facts(
        kind="activations",
        model=manifest.model,
        fingerprint=manifest.fingerprint,
        activation=str(manifest.rule),
        shape=f"{len(manifest.layers)} layers{experts}, hidden size {manifest.hidden_size}, FFN "
        f"{manifest.ffn_width}; {tokens:,} tokens",
        corpora=[manifest.corpus],
        measures=[
            Measure(
                "true sparsity",
                "true_sparsity",
                fmean(found.mean for found in sparsity.values()),
                manifest.corpus,
                "all splits",
            )
        ],
        layers=[
            {"layer": float(layer), "true_sparsity": found.mean, "p5": found.p5, "p95": found.p95}
            for layer, found in sparsity.items()
        ],
    )


def bundle_facts(file: GGUFFile, predictors: PredictorSet) -> Facts:
    """Describe a bundle; one whose predictors are of another model, or of none, has no scores."""
    fingerprint = file.keys.get("sparsecast.model_fingerprint")
    manifest = predictors.manifest
    if manifest is not None and manifest.fingerprint == fingerprint:
        facts = predictor_facts(predictors)
    else:
        threshold = float(file.keys.get("sparsecast.activation_threshold") or 0.0)
        rule = ActivationRule("fatrelu" if threshold else "relu", threshold)
        why = "came without a manifest" if manifest is None else "were trained for another model"
        facts = Facts(
            kind="bundle",
            model=None,
            fingerprint=str(fingerprint) if fingerprint else None,
            activation=str(rule),
            shape=f"{len(predictors.layers)} layers",
            notes=[f"The predictors {why}: no scores of them with this model are known."],
        )
    facts.kind, facts.layers = "bundle", []  # the bundle's own card has the table
    return facts


def model_facts(values: dict[str, Any], rule: str, fingerprint: str, shape: str) -> Facts:
    """Describe a model.

    Args:
        values: sparsify.json, or nothing for one that was converted.
    """
    facts = Facts(
        kind="model",
        model=values.get("model") if isinstance(values.get("model"), str) else None,
        fingerprint=fingerprint,
        activation=rule,
        shape=shape,
    )
    if isinstance(values.get("corpus"), str):
        facts.corpora = [values["corpus"]]
    rows = values.get("held_out")
    if not isinstance(rows, dict) or not rows or not all(map(_is_score, rows.values())):
        return facts
    corpus = facts.corpora[0] if facts.corpora else "held-out text"
    last = list(rows.values())[-1]
    original = next((row for name, row in rows.items() if name.endswith(" original")), None)
    facts.measures = [
        Measure("perplexity", "perplexity", last["perplexity"], corpus, "held-out"),
        Measure("true sparsity", "true_sparsity", last["sparsity"], corpus, "held-out"),
    ]
    if original is not None:
        change = last["perplexity"] / original["perplexity"] - 1
        facts.measures.append(
            Measure("change in perplexity", "perplexity_change", change, corpus, "held-out")
        )
    return facts


def _is_score(row: Any) -> bool:
    """Return whether a row of sparsify.json has the numbers that a card shows."""
    if not isinstance(row, dict) or not is_number(row.get("sparsity")):
        return False
    return is_number(row.get("perplexity")) and row["perplexity"] > 0


def _span(ranks: list[int]) -> str:
    low, high = min(ranks), max(ranks)
    return str(low) if low == high else f"{low} to {high}"
