"""The stage: held-out scores as JSON, Markdown, one HTML page, and a table on the screen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from sparsecast.collect.atomic import new_folder, read_json, write_json, write_text
from sparsecast.collect.errors import InputError
from sparsecast.collect.progress import console
from sparsecast.collect.store import ActivationStore
from sparsecast.predictors.checkpoint import PredictorSet, check_belongs, load_predictors
from sparsecast.predictors.config import ReportConfig
from sparsecast.predictors.html import page
from sparsecast.predictors.plots import curves, recall_and_sparsity, traffic_bars
from sparsecast.predictors.score import SPLIT, LayerScore, score_layers

COLUMNS = {
    "layer": "layer",
    "recall": "recall",
    "predicted_sparsity": "pred. spars.",
    "true_sparsity": "true spars.",
    "precision": "prec.",
    "roc_auc": "AUC",
    "traffic": "traffic",
    "cascade": "cascade",
    "exact": "exact",
    "oracle": "oracle",
}


def report(cfg: ReportConfig) -> dict[str, Any]:
    """Score and write; an earlier report under `cfg.out` is replaced.

    Raises:
        InputError: No predictors or activations there, or they belong to different models.
    """
    predictors, store = load_predictors(cfg.predictors), ActivationStore(cfg.activations)
    made = store.manifest
    check_belongs(
        predictors,
        str(cfg.predictors),
        layers=len(predictors.layers),
        hidden_size=made.hidden_size,
        ffn_width=made.ffn_width,
        fingerprint=made.fingerprint,
        model=f"{cfg.activations} ({made.model})",
    )
    change = _perplexity_change(cfg.evaluation)
    scores = score_layers(predictors, store, str(cfg.predictors))
    result = summarise(scores, predictors, store, change)
    rows = _rows(result)
    figures = [
        recall_and_sparsity(result["layers"]),
        curves(result["layers"], [score.curve for score in scores]),
        traffic_bars(result["layers"]),
    ]
    with new_folder(cfg.out, replaces="report.json") as folder:
        write_json(folder / "report.json", result)
        write_text(folder / "report.md", _markdown(result, rows))
        write_text(folder / "report.html", page(result, rows, figures))
    if cfg.json is not None:
        write_json(Path(cfg.json), result)
    _show(rows, change)
    return result


def summarise(
    scores: list[LayerScore], predictors: PredictorSet, store: ActivationStore, change: float | None
) -> dict[str, Any]:
    """The report's JSON; means are plain means over layers, over those that have the number."""
    layers = [score.values for score in scores]
    mean: dict[str, float | None] = {}
    for name in layers[0]:
        known = [row[name] for row in layers if row[name] is not None]
        mean[name] = sum(known) / len(known) if known else None
    mean["layer"] = None
    dtype = predictors.manifest.dtype if predictors.manifest else "f16"
    return {
        "layers": layers,
        "mean": mean,
        "tokens": store.manifest.tokens(SPLIT),
        "predictor_bytes": sum(2 * w.numel() for layer in predictors.layers for w in layer),
        "model": store.manifest.model,
        "predictor_dtype": dtype,
        "threshold": predictors.threshold,
        "perplexity_change": change,
    }


def _perplexity_change(path: Path | None) -> float | None:
    if path is None:
        return None
    value = read_json(path, "the JSON of `sparsecast evaluate`").get("change", {})
    change = value.get("predicted") if isinstance(value, dict) else None
    if not isinstance(change, (int, float)):
        raise InputError(
            f"{path}: has no number under change.predicted; write it with "
            "`sparsecast evaluate --json`"
        )
    return float(change)


def _rows(result: dict[str, Any]) -> list[list[str]]:
    """Header, layers, mean."""
    rows = [list(COLUMNS.values())]
    for row in (*result["layers"], result["mean"]):
        cells = ["mean" if row["layer"] is None else str(row["layer"])]
        for name in list(COLUMNS)[1:]:
            cells.append("-" if row[name] is None else f"{row[name]:.3f}")
        rows.append(cells)
    return rows


def _markdown(result: dict[str, Any], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---:|" * len(COLUMNS))
    change = result["perplexity_change"]
    loss = "not evaluated" if change is None else f"{change:+.2%}"
    return (
        f"# Predictors of {result['model']}\n\n"
        f"{result['tokens']:,} held-out tokens, rank {result['mean']['rank']:g}, "
        f"{result['predictor_dtype']}, {result['predictor_bytes']:,} bytes, threshold "
        f"{result['threshold']:g}. Perplexity with the predictors in the loop: {loss}.\n"
        "Traffic is relative to the dense FFN in f16.\n\n" + "\n".join(lines) + "\n"
    )


def _show(rows: list[list[str]], change: float | None) -> None:
    table = Table(
        title="held-out scores", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows[1:]:
        table.add_row(*row, style="bold" if row is rows[-1] else None)
    console.print(table)
    if change is not None:
        console.print(f"perplexity with the predictors in the loop: {change:+.2%}")
