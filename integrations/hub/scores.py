"""Scores of a report and an evaluation that lie beside the folder that is pushed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sparsecast.core.errors import InputError, one_line
from sparsecast.core.files import read_json
from sparsecast.core.manifests import is_number, is_text
from sparsecast.core.options import short_repr
from sparsecast.integrations.hub.config import PushConfig
from sparsecast.integrations.hub.facts import Facts, Measure, score_measures
from sparsecast.predictors.checkpoint import PredictorSet
from sparsecast.predictors.report.result import read_evaluation

REPORT, EVALUATION = "report.json", "evaluate.json"
CHANGES = {
    "perplexity_change": "change in perplexity with predictors",
    "bundle_perplexity_change": "change in perplexity as PowerInfer computes it",
}


def more_measures(cfg: PushConfig, facts: Facts, predictors: PredictorSet | None) -> list[Measure]:
    """Return the held-out scores of --report and the changes in perplexity of --evaluation.

    Raises:
        InputError: The folder has no predictors of its model, or the report is of others.
    """
    given = {"--report": cfg.report, "--evaluation": cfg.evaluation}
    if predictors is None or not facts.measures:
        if option := next((name for name, path in given.items() if path is not None), None):
            raise InputError(
                f"{option}: is about predictors, and {cfg.folder} has none that were trained for "
                "its model; leave it out"
            )
        return []
    found = []
    changes: dict[str, Any] = {}
    if (path := cfg.report or _inside(cfg.folder, REPORT)) is not None:
        value = _report(path, predictors)
        named = value.get("corpus")
        corpus = one_line(named) if is_text(named) and named else "the recorded text"
        found += score_measures(value["mean"], corpus, "held-out")
        changes = value
    if (path := cfg.evaluation or _inside(cfg.folder, EVALUATION)) is not None:
        changes = read_evaluation(path)
    told = changes.get("evaluated_on")
    text = (one_line(told) if is_text(told) else "").partition(" of ")[2] or "held-out text"
    return found + [
        Measure(label, name, float(changes[name]), text, "held-out")
        for name, label in CHANGES.items()
        if is_number(changes.get(name))
    ]


def _inside(folder: Path, name: str) -> Path | None:
    return folder / name if os.path.lexists(folder / name) else None


def _report(path: Path, predictors: PredictorSet) -> dict[str, Any]:
    """Read a report, and refuse one of other predictors."""
    path = path / REPORT if path.is_dir() else path
    value = read_json(path, "the report.json of `sparsecast report`")
    if not isinstance(value.get("mean"), dict) or "predictor_bytes" not in value:
        raise InputError(f"{path}: is no report.json; give what `sparsecast report` wrote")
    found = (value["predictor_bytes"], value.get("threshold"))
    if found != (ours := (predictors.nbytes, predictors.threshold)):
        raise InputError(
            f"{path}: is of other predictors, of {short_repr(found[0])} bytes with threshold "
            f"{short_repr(found[1])}, but "
            f"the folder's have {ours[0]} and {ours[1]}; report on these"
        )
    return value
