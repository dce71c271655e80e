"""The contents of report.json: scores, entries side by side, and changes in perplexity.

docs/file-formats.md and the README list the keys.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsecast.collect.store.store import ActivationStore
from sparsecast.core.errors import InputError, one_line
from sparsecast.core.files import read_json
from sparsecast.core.manifests import is_count, is_number, is_text
from sparsecast.predictors.baselines.sparseinfer import sign_nbytes
from sparsecast.predictors.checkpoint import PredictorSet
from sparsecast.predictors.report.score import SPLIT, LayerScore, means


def summarize(
    scores: list[LayerScore], predictors: PredictorSet, store: ActivationStore
) -> dict[str, Any]:
    """The scores of one predictor folder, per layer and on average."""
    experts = [row for score in scores for row in score.experts]
    return {
        "layers": [score.values for score in scores],
        **({"experts": experts} if experts else {}),
        "mean": means(scores),
        "tokens": store.manifest.tokens(SPLIT),
        "predictor_bytes": predictors.nbytes,
        "model": store.manifest.model,
        "predictor_dtype": _dtype(predictors),
        "threshold": predictors.threshold,
        "against": [],
    }


def folder_entry(path: Path, predictors: PredictorSet, mean: dict[str, Any]) -> dict[str, Any]:
    """A predictor folder, as one of the entries under `against`."""
    manifest = predictors.manifest
    return {
        "name": path.resolve().name,
        "recipe": manifest.recipe.get("recipe", "default") if manifest else None,
        "rank": mean["rank"],
        "dtype": _dtype(predictors),
        "train_tokens": manifest.recipe.get("train_tokens") if manifest else None,
        "predictor_bytes": predictors.nbytes,
        "mean": mean,
    }


def sign_entry(scores: list[LayerScore], store: ActivationStore) -> dict[str, Any]:
    """SparseInfer's rule, as one of the entries under `against`."""
    return {
        "name": "sign",
        "recipe": "sign",
        "rank": None,
        "dtype": "1 bit",
        "train_tokens": None,
        "predictor_bytes": len(store.manifest.ffns) * sign_nbytes(store),
        "mean": means(scores),
    }


def by_train_tokens(against: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Group entries that differ only in training tokens, fewest first.

    Returns:
        What a group shares, in words, to its entries; groups of a single size are left out.
    """
    groups = defaultdict(list)
    for entry in against:
        if entry["train_tokens"] is not None:
            groups[f"{entry['recipe']}, rank {entry['rank']:g}, {entry['dtype']}"].append(entry)
    return {
        shared: sorted(entries, key=lambda entry: entry["train_tokens"])
        for shared, entries in groups.items()
        if len({entry["train_tokens"] for entry in entries}) > 1
    }


def read_evaluation(path: Path | None) -> dict[str, Any]:
    """The changes in perplexity that `sparsecast evaluate` measured, and on which text.

    The bundle's is null for a model that PowerInfer cannot run.

    Raises:
        InputError: Not the JSON of `sparsecast evaluate`.
    """
    if path is None:
        return {"perplexity_change": None, "bundle_perplexity_change": None, "evaluated_on": None}
    value = read_json(path, "the JSON of `sparsecast evaluate`")
    found = value.get("change", {})
    changes = {
        name: change if _is_change(change := found.get(name)) else None
        for name in ("predicted", "bundle")
        if isinstance(found, dict)
    }
    if changes.get("predicted") is None:
        raise InputError(
            f"{path}: has no number under change.predicted; write it with "
            "`sparsecast evaluate --json`"
            + (", and with --corpus beside --tasks" if "tasks" in value else "")
        )
    tokens, corpus = value.get("tokens"), value.get("corpus")
    count = f"{tokens:,} held-out tokens" if is_count(tokens) else "held-out tokens"
    named = one_line(corpus) if is_text(corpus) else "an unnamed text"
    return {
        "perplexity_change": changes["predicted"],
        "bundle_perplexity_change": changes["bundle"],
        "evaluated_on": f"{count} of {named}",
    }


def _is_change(value: Any) -> bool:
    """Whether a value can be a ratio of perplexities less 1."""
    return is_number(value) and value > -1


def _dtype(predictors: PredictorSet) -> str:
    dtypes = {layer.dtype for layer in predictors.layers}
    return dtypes.pop() if len(dtypes) == 1 else "mixed"
