"""The stage: held-out scores as JSON, Markdown, one HTML page, and a table on the screen."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from sparsecast.collect.atomic import (
    check_new,
    json_text,
    new_folder,
    read_json,
    refuse_unwritable,
    write_text,
)
from sparsecast.collect.disk import told_when_full
from sparsecast.collect.errors import InputError
from sparsecast.collect.firing import check_firing
from sparsecast.collect.lock import locked
from sparsecast.collect.progress import console
from sparsecast.collect.store import ActivationStore
from sparsecast.predictors.checkpoint import PredictorSet, check_belongs, load_predictors
from sparsecast.predictors.config import ReportConfig
from sparsecast.predictors.html import page
from sparsecast.predictors.plots import curves, data_needed, recall_and_sparsity, traffic_bars
from sparsecast.predictors.recorded import check_recorded
from sparsecast.predictors.score import SPLIT, LayerScore, means, score_layers, times_oracle
from sparsecast.predictors.sign import score_sign, sign_nbytes

Rows = list[list[str]]
"""A table as text, header first."""

COLUMNS = {
    "layer": "layer",
    "recall": "recall",
    "recall_p5": "recall p5",
    "recall_first_token": "first token",
    "predicted_sparsity": "pred. spars.",
    "true_sparsity": "true spars.",
    "precision": "prec.",
    "roc_auc": "AUC",
    "average_precision": "AP",
    "traffic": "traffic",
    "cascade": "cascade",
    "exact": "exact",
    "oracle": "oracle",
}
WIDE = ("recall p5", "first token", "AP", "train tokens")
"""Columns that the screen's tables leave out, to fit 80 characters."""
AFTER = "the scores are on the screen; make room and run the same command again"
SIDE_BY_SIDE = ("recall", "recall_p5", "predicted_sparsity", "average_precision", "traffic")
DATA_NEEDED = ("recall", "recall_p5", "predicted_sparsity", "traffic")


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
    out = check_new(cfg.out, replaces="report.json", beside=_beside(cfg))
    if cfg.json is not None:
        refuse_unwritable(cfg.json, "--json")
    with locked(out, "report"):
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
    change = _perplexity_change(cfg.evaluation)
    scores = score_layers(predictors, store, str(cfg.predictors))
    result = summarise(scores, predictors, store, change)
    if cfg.against is not None:
        result["against"] = [_entry(cfg.predictors, predictors, result["mean"])]
        for item in others.values():
            if item == "sign":
                entry = _sign_entry(cfg, predictors, store)
            else:
                other = _predictors(item, store)
                entry = _entry(item, other, means(score_layers(other, store, str(item))))
            result["against"].append(entry)
    _show(result)
    _write(cfg, result, [score.curve for score in scores])
    return result


def _predictors(path: Path, store: ActivationStore, layers: int | None = None) -> PredictorSet:
    predictors, made = load_predictors(path), store.manifest
    check_belongs(
        predictors,
        str(path),
        layers=layers or len(predictors.layers),
        hidden_size=made.hidden_size,
        ffn_width=made.ffn_width,
        fingerprint=made.fingerprint,
        model=f"{store.folder} ({made.model})",
    )
    return predictors


def summarise(
    scores: list[LayerScore], predictors: PredictorSet, store: ActivationStore, change: float | None
) -> dict[str, Any]:
    """The report's JSON, compared with no others."""
    return {
        "layers": [score.values for score in scores],
        "mean": means(scores),
        "tokens": store.manifest.tokens(SPLIT),
        "predictor_bytes": _nbytes(predictors),
        "model": store.manifest.model,
        "predictor_dtype": _dtype(predictors),
        "threshold": predictors.threshold,
        "perplexity_change": change,
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
        "predictor_bytes": _nbytes(predictors),
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


def _nbytes(predictors: PredictorSet) -> int:
    return sum(layer.nbytes for layer in predictors.layers)


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


def _write(
    cfg: ReportConfig, result: dict[str, Any], points: list[list[tuple[float, float]]]
) -> None:
    """Every file, from the JSON and each layer's curve."""
    layers, against = result["layers"], result["against"]
    needed = by_train_tokens(against)
    rows, side = _layer_rows(result), _side_rows(against)
    data = {shared: _data_rows(entries) for shared, entries in needed.items()}
    html = page(
        result,
        [recall_and_sparsity(layers), curves(layers, points), traffic_bars(layers)],
        rows,
        side,
        {shared: (data_needed(entries), data[shared]) for shared, entries in needed.items()},
    )
    files = {
        "report.json": json_text(result),
        "report.md": _markdown(result, rows, side, data),
        "report.html": html,
    }
    need = sum(len(text.encode()) for text in files.values())
    with (
        told_when_full(cfg.out, need, "the report", lambda: AFTER),
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


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _layer_rows(result: dict[str, Any]) -> Rows:
    """Header, layers, mean."""
    _, *names = COLUMNS
    rows = [list(COLUMNS.values())]
    for row in (*result["layers"], result["mean"]):
        label = "mean" if row["layer"] is None else str(row["layer"])
        rows.append([label, *(_number(row[name]) for name in names)])
    return rows


def _side_rows(against: Sequence[dict[str, Any]]) -> Rows:
    """Header and one row a folder, the report's own first; nothing where none was asked for."""
    if not against:
        return []
    named = ["predictors", "recipe", "rank", "format", "train tokens", "MB"]
    rows = [[*named, *(COLUMNS[name] for name in SIDE_BY_SIDE), "x oracle"]]
    for entry in against:
        tokens, times = entry["train_tokens"], times_oracle(entry["mean"])
        rows.append(
            [
                entry["name"],
                entry["recipe"] or "-",
                "-" if entry["rank"] is None else f"{entry['rank']:g}",
                entry["dtype"],
                "-" if tokens is None else f"{tokens:,}",
                f"{entry['predictor_bytes'] / 1e6:.3g}",
                *(_number(entry["mean"][name]) for name in SIDE_BY_SIDE),
                "-" if times is None else f"{times:.2f}",
            ]
        )
    return rows


def _data_rows(entries: Sequence[dict[str, Any]]) -> Rows:
    rows = [["training tokens", *(COLUMNS[name] for name in DATA_NEEDED)]]
    for entry in entries:
        values = [_number(entry["mean"][name]) for name in DATA_NEEDED]
        rows.append([f"{entry['train_tokens']:,}", *values])
    return rows


def _markdown(result: dict[str, Any], rows: Rows, side: Rows, data: dict[str, Rows]) -> str:
    change, mean, times = result["perplexity_change"], result["mean"], times_oracle(result["mean"])
    loss = "not evaluated" if change is None else f"{change:+.2%}"
    multiple = "" if times is None else f", {times:.2f} times the oracle's"
    text = (
        f"# Predictors of {result['model']}\n\n"
        f"{result['tokens']:,} held-out tokens, rank {mean['rank']:g}, "
        f"{result['predictor_dtype']}, {result['predictor_bytes']:,} bytes, threshold "
        f"{result['threshold']:g}. Perplexity with the predictors in the loop: {loss}.\n"
        f"Traffic is relative to the dense FFN in f16: {mean['traffic']:.3f}{multiple}.\n\n"
        + _markdown_table(rows)
    )
    if side:
        text += f"\n## Side by side\n\nMeans over layers, same tokens.\n\n{_markdown_table(side)}"
    if data:
        text += "\n## How much data is enough\n"
    for shared, table in data.items():
        text += f"\n{shared}:\n\n{_markdown_table(table)}"
    return text


def _markdown_table(rows: Rows) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    lines.insert(1, "|" + "---:|" * len(rows[0]))
    return "\n".join(lines) + "\n"


def _show(result: dict[str, Any]) -> None:
    rows = _layer_rows(result)
    _show_table("held-out scores", rows, bold=len(rows) - 1)
    if result["against"]:
        _show_table("side by side", _side_rows(result["against"]), bold=1)
    if (change := result["perplexity_change"]) is not None:
        console.print(f"perplexity with the predictors in the loop: {change:+.2%}")


def _show_table(title: str, rows: Rows, bold: int) -> None:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    shown = [i for i, name in enumerate(rows[0]) if name not in WIDE]
    for i in shown:
        name = rows[0][i]
        least = max(map(len, name.split()))
        table.add_column(name, justify="right", min_width=least, overflow="fold")
    for number, row in enumerate(rows[1:], start=1):
        cells = (escape(row[i]) for i in shown)
        table.add_row(*cells, style="bold" if number == bold else None)
    console.print(table)
