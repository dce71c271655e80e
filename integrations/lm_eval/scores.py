"""lm-eval's results of several modes, side by side.

The modes answer the same requests, so their difference has a standard error of its own, that of the
paired difference: std(m_i - d_i) / sqrt(n) over the documents i. It is far smaller than the
standard errors of the two scores where the modes mostly agree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.table import Table

from sparsecast.core.messages import show
from sparsecast.predictors.modes import MODES, Mode


@dataclass(frozen=True)
class Score:
    """One metric of one task in one mode."""

    value: float | None
    stderr: float | None
    by_document: dict[Any, float] = field(default_factory=dict)
    """Document's number to its value, if the metric is their mean."""


Scores = dict[str, dict[str, Score]]
"""Task to metric, with lm-eval's name of the filter (`acc,none`), to score."""


def read_scores(results: Mapping[str, Any]) -> Scores:
    """Read what `lm_eval.evaluate` returned, with logged samples; groups are tasks too."""
    scores: Scores = {}
    for task, metrics in results["results"].items():
        found = {}
        for key, value in metrics.items():
            metric, comma, kept = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            number = _number(value)
            documents = _by_document(results.get("samples", {}).get(task, []), metric, kept)
            mean = sum(documents.values()) / len(documents) if documents else math.nan
            if number is None or not math.isclose(mean, number, rel_tol=1e-6, abs_tol=1e-9):
                documents = {}
            stderr = _number(metrics.get(f"{metric}_stderr,{kept}"))
            found[key] = Score(number, stderr, documents)
        scores[task] = found
    return scores


def _number(value: object) -> float | None:
    """Return a finite number; lm-eval writes N/A where it has none."""
    if isinstance(value, str) or not hasattr(value, "__float__"):
        return None
    return number if math.isfinite(number := float(value)) else None


def _by_document(samples: list[dict[str, Any]], metric: str, kept: str) -> dict[Any, float]:
    own = [sample for sample in samples if sample.get("filter") == kept]
    values = {sample["doc_id"]: _number(sample.get(metric)) for sample in own}
    if len(values) != len(own) or None in values.values():
        return {}
    return {number: value for number, value in values.items() if value is not None}


def paired_stderr(score: Score, dense: Score) -> float | None:
    """Return the standard error of `score - dense`; None if the metric is no mean over documents,
    or over fewer than two."""
    ours, theirs = score.by_document, dense.by_document
    if len(ours) < 2 or ours.keys() != theirs.keys():
        return None
    differences = [ours[number] - theirs[number] for number in ours]
    mean = sum(differences) / len(differences)
    variance = sum((d - mean) ** 2 for d in differences) / (len(differences) - 1)
    return math.sqrt(variance / len(differences))


def side_by_side(
    by_mode: Mapping[Mode, Scores | None], results: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what --json says of the tasks.

    Args:
        by_mode: None for a mode that was not measured.
        results: What `lm_eval.evaluate` returned for any mode, for what does not depend on it.
    """
    dense_scores = by_mode["dense"]
    assert dense_scores is not None
    tasks = {}
    for task, metrics in dense_scores.items():
        better = results["higher_is_better"].get(task) or {}
        rows = {}
        for key, dense in metrics.items():
            row: dict[str, Any] = {"higher_is_better": better.get(key.partition(",")[0])}
            for mode, scores in by_mode.items():
                row[mode] = None if scores is None else _entry(mode, scores[task][key], dense)
            rows[key] = row
        tasks[task] = {
            "documents": results["results"][task].get("sample_len"),
            "num_fewshot": results["n-shot"].get(task),
            "version": results["versions"].get(task),
            "metrics": rows,
        }
    return tasks


def _entry(mode: Mode, score: Score, dense: Score) -> dict[str, float | None]:
    entry = {"value": score.value, "stderr": score.stderr}
    if mode == "dense":
        return entry
    known = score.value is not None and dense.value is not None
    change = score.value - dense.value if known else None  # type: ignore[operator]
    return entry | {"change": change, "change_stderr": paired_stderr(score, dense)}


def show_tasks(tasks: Mapping[str, Any]) -> None:
    """Show every metric with a column per mode: scores and changes, each above its error."""
    modes = [mode for mode in MODES if mode in _first_row(tasks)]
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("task", no_wrap=True)
    table.add_column("n", justify="right")
    table.add_column("metric", overflow="fold")
    for mode in modes:
        table.add_column(mode, justify="right", no_wrap=True)
    for task, entry in tasks.items():
        head = [task, "" if entry["documents"] is None else f"{entry['documents']:,}"]
        for key, row in entry["metrics"].items():
            metric, _, kept = key.partition(",")
            lines = {metric if kept == "none" else f"{metric}, {kept}": _cells(row, modes, "value")}
            lines["  stderr"] = _cells(row, modes, "stderr")
            lines["  change"] = _cells(row, modes, "change", "+")
            lines["  its stderr"] = _cells(row, modes, "change_stderr")
            for label, cells in lines.items():
                if any(cells) or not label.startswith(" "):
                    table.add_row(*head, label, *cells)
                    head = ["", ""]
    show(table)


def _first_row(tasks: Mapping[str, Any]) -> dict[str, Any]:
    rows = (row for entry in tasks.values() for row in entry["metrics"].values())
    return next(rows, {})


def _cells(row: Mapping[str, Any], modes: list[Mode], name: str, sign: str = "") -> list[str]:
    values = ((row[mode] or {}).get(name) for mode in modes)
    return ["" if value is None else _short(value, sign) for value in values]


def _short(value: float, sign: str) -> str:
    return f"{value:{sign}.4f}" if abs(value) < 10_000 else f"{value:{sign}.3e}"
