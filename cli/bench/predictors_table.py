"""The tables of `sparsecast bench predictors`."""

from __future__ import annotations

from functools import reduce
from typing import Any

from rich.table import Table

from sparsecast.cli.bench.predictors_scores import OURS
from sparsecast.cli.bench.results import new_table
from sparsecast.core.messages import log, show

ROWS = ("reference", "svd", "sign", OURS)
CHANGE, SHARE = "+.3%", ".4f"
"""Formats of changes of perplexity and of shares."""


def show_predictors(values: dict[str, Any]) -> None:
    """Show what `bench_predictors` returns."""
    show(_misses_table(values))
    tables = [(values["perplexity"], "perplexity", "")]
    if "other" in values:
        other = values["other"]
        where = f", scored on {other['held_out_tokens']:,} tokens of {other['activations']}"
        tables.append((other, "other", where))
    for found, name, where in tables:
        show(_perplexity_table(values, found, name, where))
        if name == "perplexity":
            _tell_not_met(found)
        if found["over_oracle"] is not None:
            against = ""
            if (ratio := found["traffic_ratio"]) is not None:
                against = f"{ratio:.3f} times the reference's, "
            log.info(f"ours{where}: traffic {against}{found['over_oracle']:.2f} times the oracle's")


def _misses_table(values: dict[str, Any]) -> Table:
    reference = values["reference"]
    table = new_table(
        "", "rank", "format", "bytes", "recall", "misses against reference",
        title=f"misses at the reference's predicted sparsity ({reference['predicted_sparsity']:.4f}"
        f" on {values['held_out_tokens']:,} held-out tokens{_seeds(values)})",
    )  # fmt: skip
    for name in ("reference", "same_rank", "same_bytes"):
        row = values[name]
        table.add_row(
            name.replace("_", " "),
            str(row["rank"]),
            row.get("dtype", "f16"),
            f"{row['bytes']:,}",
            _cell(values, (name, "recall"), SHARE),
            "1" if name == "reference" else _cell(values, (name, "miss_ratio"), ".3f"),
        )
    return table


def _perplexity_table(
    values: dict[str, Any], found: dict[str, Any], name: str, where: str
) -> Table:
    """A column for each rule, so that ranges of seeds fit 80 columns."""
    table = new_table(
        "", *ROWS,
        title=f"at most {found['limit']:+.2%} perplexity on calibration documents{where}"
        f"{_limits(found)}{_seeds(values)}",
    )  # fmt: skip
    ranks = [found[row]["rank"] for row in ROWS]
    table.add_row("rank", *("-" if rank is None else f"{rank:g}" for rank in ranks))
    table.add_row("format", *(found[row]["dtype"] or "-" for row in ROWS))
    table.add_row("held-out change", *(_change(values, found[row], (name, row)) for row in ROWS))
    for score in ("recall", "predicted_sparsity", "traffic", "cascade"):
        cells = (_cell(values, (name, row, score), SHARE) for row in ROWS)
        table.add_row(score.replace("_", " "), *cells)
    ratios = (_cell(values, (name, "traffic_over", row), ".3f") for row in ROWS if row != OURS)
    table.add_row("ours / this", *ratios, "1")
    return table


def _change(values: dict[str, Any], row: dict[str, Any], path: tuple[str, ...]) -> str:
    """The change of perplexity, or that the limit was not met in every seed."""
    return _cell(values, (*path, "held_out_change"), CHANGE) if row["met"] else "not met"


def _tell_not_met(found: dict[str, Any]) -> None:
    """Log which rules cannot stay within the limit, and how near they came."""
    for name in ROWS:
        if not (row := found[name])["met"]:
            if (closest := row["closest_change"]) is None:
                log.info(f"{name}: met by some seeds alone")
            else:
                log.info(f"{name}: not met, {closest:{CHANGE}} at best")


def _limits(found: dict[str, Any]) -> str:
    """What no predictor, and a perfect one, take on the same tokens."""
    known = next((found[row] for row in ROWS if found[row]["met"]), None)
    if known is None:
        return ""
    return (
        f"; traffic {known['exact']:.4f} without predictor, {known['oracle']:.4f} of a perfect one"
    )


def _seeds(values: dict[str, Any]) -> str:
    seeds = values["seeds"]
    return "" if seeds == 1 else f"; means of {seeds} seeds, smallest to largest"


def _cell(values: dict[str, Any], path: tuple[str, ...], form: str) -> str:
    """A number; below it the smallest and the largest of all seeds, where they differ."""
    mean = _at(values, path)
    if mean is None:
        return "-"
    text = format(mean, form)
    if "smallest" not in values:
        return text
    low, high = (_at(values[name], path) for name in ("smallest", "largest"))
    return text if low == high else f"{text}\n{low:{form}} to {high:{form}}"


def _at(values: dict[str, Any], path: tuple[str, ...]) -> Any:
    return reduce(lambda inner, name: inner[name], path, values)
