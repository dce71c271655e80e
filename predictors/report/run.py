"""The stage: held-out scores as JSON, Markdown, one HTML page, and a table on the screen."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sparsecast.collect.store.firing import check_firing
from sparsecast.collect.store.store import ActivationStore
from sparsecast.core.disk import explain_full_disk
from sparsecast.core.errors import InputError
from sparsecast.core.files import (
    check_new_folder,
    check_writable_file,
    json_text,
    new_folder,
    read_json,
    write_text,
)
from sparsecast.core.lock import lock_folder
from sparsecast.core.options import command_of
from sparsecast.predictors.baselines.sparseinfer import sign_nbytes
from sparsecast.predictors.checkpoint import PredictorSet, load_predictors
from sparsecast.predictors.compatibility import check_model
from sparsecast.predictors.config import ReportConfig
from sparsecast.predictors.recorded_model import check_recorded
from sparsecast.predictors.report.html import page
from sparsecast.predictors.report.plots import (
    curves,
    data_needed,
    recall_and_sparsity,
    traffic_bars,
)
from sparsecast.predictors.report.score import SPLIT, LayerScore, means, score_layers, score_sign
from sparsecast.predictors.report.text import (
    data_rows,
    layer_rows,
    markdown,
    show_report,
    side_rows,
)
from sparsecast.predictors.report.wording import verdict

AFTER = "the scores are on the screen; make room and run the same command again"


def report(cfg: ReportConfig) -> dict[str, Any]:
    """Score and write; an earlier report under `cfg.out` is replaced.

    Memory: see `score_layers`, and the predictors of `cfg.predictors` and of one other folder; for
    sign, see `score_sign`.

    Raises:
        InputError: No predictors, activations or model there, or they belong to different models;
            `cfg.out` holds other files than a report's, cannot be written, or is being written by
            another report.
        OSError: Writing failed all the same; the scores are on the screen.
    """
    out = check_new_folder(cfg.out, replaces="report.json", beside=_beside(cfg))
    if cfg.json is not None:
        check_writable_file(cfg.json, "--json")
    with lock_folder(out, "report"):
        return _report(cfg)


def _report(cfg: ReportConfig) -> dict[str, Any]:
    store = ActivationStore(cfg.activations)
    check_firing(store.stats(), store.manifest.layers, str(cfg.activations), [SPLIT])
    predictors = _predictors(cfg.predictors, store)
    others = {item if item == "sign" else item.resolve(): item for item in cfg.against or []}
    others.pop(cfg.predictors.resolve(), None)
    for item in others.values():
        if item == "sign":
            assert cfg.model is not None
            check_recorded(cfg.model, store)
        else:
            _predictors(item, store, layers=len(predictors.layers))
    evaluated = _evaluated(cfg.evaluation)
    scores = score_layers(predictors, store, str(cfg.predictors))
    result = summarize(scores, predictors, store) | evaluated
    result |= {
        "corpus": store.manifest.corpus,
        "date": today(),
        "version": version("sparsecast"),
        "command": command_of("report", cfg),
        "verdict": verdict(result),
    }
    if cfg.against is not None:
        result["against"] = [_entry(cfg.predictors, predictors, result["mean"])]
        for item in others.values():
            if item == "sign":
                entry = _sign_entry(cfg, predictors, store)
            else:
                other = _predictors(item, store)
                entry = _entry(item, other, means(score_layers(other, store, str(item))))
            result["against"].append(entry)
    show_report(result)
    _write(cfg, result, [score.curve for score in scores])
    return result


def _predictors(path: Path, store: ActivationStore, layers: int | None = None) -> PredictorSet:
    predictors, made = load_predictors(path), store.manifest
    check_model(
        predictors,
        str(path),
        replace(made.model_shape, layers=layers or len(predictors.layers)),
        fingerprint=made.fingerprint,
        model=f"{store.folder} ({made.model})",
    )
    if (manifest := predictors.manifest) is not None:
        pairs = {
            "input": (manifest.convention, made.convention),
            "activation": (str(manifest.rule), str(made.rule)),
            "number of FFN matrices": (manifest.ffn_matrices, made.ffn_matrices),
        }
        if odd := [f"{name} {a}, not {b}" for name, (a, b) in pairs.items() if a != b]:
            raise InputError(
                f"{path}: was trained for another use than {store.folder} was recorded for: "
                f"{'; '.join(odd)}; give activations that were recorded alike"
            )
    return predictors


def summarize(
    scores: list[LayerScore], predictors: PredictorSet, store: ActivationStore
) -> dict[str, Any]:
    """What the report's JSON says of the scores, compared with no others."""
    return {
        "layers": [score.values for score in scores],
        "mean": means(scores),
        "tokens": store.manifest.tokens(SPLIT),
        "predictor_bytes": predictors.nbytes,
        "model": store.manifest.model,
        "predictor_dtype": _dtype(predictors),
        "threshold": predictors.threshold,
        "against": [],
    }


def _entry(path: Path, predictors: PredictorSet, mean: dict[str, Any]) -> dict[str, Any]:
    """One of the folders that stand side by side."""
    made = predictors.manifest
    return {
        "name": path.resolve().name,
        "recipe": made.recipe.get("recipe", "default") if made else None,
        "rank": mean["rank"],
        "dtype": _dtype(predictors),
        "train_tokens": made.recipe.get("train_tokens") if made else None,
        "predictor_bytes": predictors.nbytes,
        "mean": mean,
    }


def _sign_entry(
    cfg: ReportConfig, predictors: PredictorSet, store: ActivationStore
) -> dict[str, Any]:
    """The rule that no folder can hold."""
    assert cfg.model is not None
    return {
        "name": "sign",
        "recipe": "sign",
        "rank": None,
        "dtype": "1 bit",
        "train_tokens": None,
        "predictor_bytes": len(predictors.layers) * sign_nbytes(store),
        "mean": means(score_sign(cfg.model, predictors, store)),
    }


def _dtype(predictors: PredictorSet) -> str:
    dtypes = {layer.dtype for layer in predictors.layers}
    return dtypes.pop() if len(dtypes) == 1 else "mixed"


def by_train_tokens(against: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Entries that differ in training tokens alone, fewest first, under what they share."""
    groups = defaultdict(list)
    for entry in against:
        if entry["train_tokens"] is not None:
            groups[f"{entry['recipe']}, rank {entry['rank']:g}, {entry['dtype']}"].append(entry)
    return {
        shared: sorted(entries, key=lambda entry: entry["train_tokens"])
        for shared, entries in groups.items()
        if len({entry["train_tokens"] for entry in entries}) > 1
    }


def today() -> str:
    """The date that a report bears."""
    return datetime.now(UTC).date().isoformat()


def _evaluated(path: Path | None) -> dict[str, Any]:
    """The changes in perplexity that `sparsecast evaluate` found, and on which text."""
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
        )
    tokens, corpus = value.get("tokens"), value.get("corpus")
    count = f"{tokens:,} held-out tokens" if isinstance(tokens, int) else "held-out tokens"
    return {
        "perplexity_change": changes["predicted"],
        "bundle_perplexity_change": changes["bundle"],
        "evaluated_on": f"{count} of {corpus if isinstance(corpus, str) else 'an unnamed text'}",
    }


def _is_change(value: object) -> bool:
    """Of a perplexity, which is above 0."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > -1


def _write(
    cfg: ReportConfig, result: dict[str, Any], points: list[list[tuple[float, float]]]
) -> None:
    """Every file, from the JSON and each layer's curve."""
    layers, against = result["layers"], result["against"]
    needed = by_train_tokens(against)
    rows, side = layer_rows(result), side_rows(against)
    data = {shared: data_rows(entries) for shared, entries in needed.items()}
    html = page(
        result,
        [recall_and_sparsity(layers), curves(layers, points), traffic_bars(layers)],
        rows,
        side,
        {shared: (data_needed(entries), data[shared]) for shared, entries in needed.items()},
    )
    files = {
        "report.json": json_text(result),
        "report.md": markdown(result, rows, side, data),
        "report.html": html,
    }
    need = sum(len(text.encode()) for text in files.values())
    with (
        explain_full_disk(cfg.out, need, "the report", lambda: AFTER),
        new_folder(cfg.out, replaces="report.json", beside=_beside(cfg)) as folder,
    ):
        for name, text in files.items():
            write_text(folder / name, text)
    if cfg.json is not None:
        write_text(cfg.json, files["report.json"])


def _beside(cfg: ReportConfig) -> tuple[str, ...]:
    """What an earlier report may have left there."""
    own = cfg.json is not None and cfg.json.resolve().parent == cfg.out.resolve()
    return ("report.md", "report.html", *([cfg.json.name] if cfg.json and own else []))
