"""The report as text: tables, report.md and what the screen shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from sparsecast.core.messages import log, show
from sparsecast.predictors.report.score import times_oracle
from sparsecast.predictors.report.wording import MIXTURE, TERMS, origin, perplexity_sentence

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
"""Columns left out on the screen, to fit 80 characters."""
OF_EXPERTS = ("recall", "predicted_sparsity", "true_sparsity", "precision", "roc_auc", "traffic")
SIDE_BY_SIDE = ("recall", "recall_p5", "predicted_sparsity", "average_precision", "traffic")
DATA_NEEDED = ("recall", "recall_p5", "predicted_sparsity", "traffic")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def layer_rows(result: dict[str, Any]) -> Rows:
    """The table of scores: header, one row per layer, mean."""
    _, *names = COLUMNS
    rows = [list(COLUMNS.values())]
    for row in (*result["layers"], result["mean"]):
        label = "mean" if row["layer"] is None else str(row["layer"])
        rows.append([label, *(_number(row[name]) for name in names)])
    return rows


def expert_rows(result: dict[str, Any]) -> Rows:
    """Header and one row per expert; empty for a dense model."""
    experts = result.get("experts", [])
    rows = [["layer", "expert", "tokens", *(COLUMNS[name] for name in OF_EXPERTS)]]
    for row in experts:
        counts = (str(row["layer"]), str(row["expert"]), f"{row['tokens']:,}")
        rows.append([*counts, *(_number(row[name]) for name in OF_EXPERTS)])
    return rows if experts else []


def side_rows(against: Sequence[dict[str, Any]]) -> Rows:
    """Header and one row per predictor folder, the report's own first; empty without any."""
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


def data_rows(entries: Sequence[dict[str, Any]]) -> Rows:
    """Header and one row per number of training tokens."""
    rows = [["training tokens", *(COLUMNS[name] for name in DATA_NEEDED)]]
    for entry in entries:
        values = [_number(entry["mean"][name]) for name in DATA_NEEDED]
        rows.append([f"{entry['train_tokens']:,}", *values])
    return rows


def markdown(
    result: dict[str, Any], rows: Rows, side: Rows, data: dict[str, Rows], experts: Rows
) -> str:
    """Render report.md; tables are empty where there is nothing to show."""
    mean = result["mean"]
    terms = "\n".join(f"- {name}: {text}" for name, text in TERMS.items())
    text = (
        f"# Predictors of {result['model']}\n\n"
        f"**{result['verdict']}**\n\n{perplexity_sentence(result)}\n\n"
        f"Rank {mean['rank']:g}, {result['predictor_dtype']}, {result['predictor_bytes']:,} bytes "
        f"as PowerInfer reads them, threshold {result['threshold']:g}. {_times(mean)}\n\n"
        + _markdown_table(rows)
        + f"\n{terms}\n"
    )
    if experts:
        text += f"\n## Experts\n\n{MIXTURE}\n\n{_markdown_table(experts)}"
    if side:
        text += "\n## Side by side\n\nMeans over layers, on the same tokens.\n\n"
        text += _markdown_table(side)
    if data:
        text += "\n## How much training data is enough\n"
    for shared, table in data.items():
        text += f"\n{shared}:\n\n{_markdown_table(table)}"
    return text + f"\n{origin(result)}\n"


def _times(mean: dict[str, Any]) -> str:
    times = times_oracle(mean)
    multiple = "" if times is None else f", {times:.2f} times the oracle's"
    return f"Traffic {mean['traffic']:.3f}{multiple}."


def _markdown_table(rows: Rows) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    lines.insert(1, "|" + "---:|" * len(rows[0]))
    return "\n".join(lines) + "\n"


def show_report(result: dict[str, Any]) -> None:
    """Print the tables, the terms of traffic, the change in perplexity and the verdict."""
    rows = layer_rows(result)
    _show_table("held-out scores", rows, bold=len(rows) - 1)
    if result["against"]:
        _show_table("side by side", side_rows(result["against"]), bold=1)
    for name in ("traffic", "cascade", "exact", "oracle"):
        log.info(f"{name}: {TERMS[name]}")
    if "experts" in result:
        log.info(MIXTURE)
    log.info(perplexity_sentence(result))
    log.info(result["verdict"], extra={"style": "bold"})


def _show_table(title: str, rows: Rows, bold: int) -> None:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    shown = [i for i, name in enumerate(rows[0]) if name not in WIDE]
    for i in shown:
        name = rows[0][i]
        least = max(map(len, name.split()))
        table.add_column(name, justify="right", min_width=least, overflow="fold")
    for number, row in enumerate(rows[1:], start=1):
        table.add_row(*(row[i] for i in shown), style="bold" if number == bold else None)
    show(table)
