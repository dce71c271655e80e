"""Broken results of earlier stages: evaluate.json, report.json, sparsify.json."""

from __future__ import annotations

import json
from pathlib import Path

from broken.json_faults import (
    DIGITS,
    HOSTILE,
    LONG,
    brief,
    edited,
    fields,
    nested,
    no_object,
    twice,
    without,
)
from broken.runner import Case

EVALUATION, REPORT, SPARSIFIED = "evaluate.json", "report.json", "sparsify.json"
OPTIONS = {"seed": 0, "model": "m"}


def write(folder: Path, predictor_bytes: int, threshold: float) -> Path:
    folder.mkdir()
    change = {"exact": 0.0, "predicted": 0.01, "bundle": 0.02}
    value = {"tokens": 100, "corpus": "text", "change": change}
    (folder / EVALUATION).write_text(json.dumps(value))
    mean = {"recall": 0.9, "predicted_sparsity": 0.8, "traffic": 0.3}
    value = {
        "mean": mean,
        "predictor_bytes": predictor_bytes,
        "threshold": threshold,
        "corpus": "text",
        "perplexity_change": 0.1,
        "evaluated_on": "100 held-out tokens of text",
    }
    (folder / REPORT).write_text(json.dumps(value))
    row = {"sparsity": 0.9, "perplexity": 9.0}
    value = {
        "options": OPTIONS,
        "model": "m",
        "corpus": "text",
        "held_out": {"m original": row, "m": row},
    }
    (folder / SPARSIFIED).write_text(json.dumps(value))
    return folder


EVALUATIONS = [
    *no_object(EVALUATION),
    Case("no changes", without(EVALUATION, "change"), only=EVALUATION),
    Case("a field twice", twice(EVALUATION, "change", {}), only=EVALUATION),
    *(
        Case(f"change {brief(value)}", fields(EVALUATION, {"change": value}), only=EVALUATION)
        for value in (None, [], 1, "x", {}, nested(90))
    ),
    *(
        Case(
            f"change.predicted {brief(value)}",
            edited(EVALUATION, lambda v, new=value: v["change"].update(predicted=new)),
            only=EVALUATION,
        )
        for value in (None, "1", [], {}, True, -1, -2, DIGITS, -DIGITS)
    ),
    *(
        Case(
            f"change.bundle {brief(value)}",
            edited(EVALUATION, lambda v, new=value: v["change"].update(bundle=new)),
            "null, as if not measured",
        )
        for value in (None, "1", -2, DIGITS)
    ),
    *(
        Case(
            f"{name} {brief(value)}",
            fields(EVALUATION, {name: value}),
            "the text is then left unnamed",
        )
        for name, value in (
            ("tokens", "x"),
            ("tokens", -1),
            ("tokens", DIGITS),
            ("tokens", None),
            ("corpus", 1),
            ("corpus", LONG),
            ("corpus", HOSTILE),
            ("corpus", None),
        )
    ),
]
REPORTS = [
    *no_object(REPORT),
    Case("no means", without(REPORT, "mean"), only=REPORT),
    Case("no bytes", without(REPORT, "predictor_bytes"), only=REPORT),
    *(
        Case(f"{name} {brief(value)}", fields(REPORT, {name: value}), only=REPORT)
        for name, value in (
            ("mean", None),
            ("mean", []),
            ("mean", 1),
            ("predictor_bytes", "x"),
            ("predictor_bytes", -1),
            ("predictor_bytes", DIGITS),
            ("predictor_bytes", LONG),
            ("predictor_bytes", HOSTILE),
            ("threshold", None),
            ("threshold", DIGITS),
            ("threshold", nested(90)),
        )
    ),
    *(
        Case(
            f"mean.recall {brief(value)}",
            edited(REPORT, lambda v, new=value: v["mean"].update(recall=new)),
            "the card leaves it out",
        )
        for value in (None, "1", [], DIGITS)
    ),
    *(
        Case(f"{name} {brief(value)}", fields(REPORT, {name: value}), "the card leaves it out")
        for name, value in (
            ("perplexity_change", "x"),
            ("perplexity_change", DIGITS),
            ("corpus", 1),
            ("corpus", HOSTILE),
            ("corpus", LONG),
            ("evaluated_on", 1),
            ("evaluated_on", HOSTILE),
            ("evaluated_on", LONG),
        )
    ),
]
MODELS = [
    *no_object(
        SPARSIFIED,
        without=(
            "gone",
            "a folder",
            "a FIFO",
            "a link to a device",
            "a link to itself",
            "a link to nothing",
        ),
    ),
    Case("no options", without(SPARSIFIED, "options")),
    *(
        Case(f"options {brief(value)}", fields(SPARSIFIED, {"options": value}))
        for value in (
            None,
            [],
            1,
            "x",
            {},
            {"seed": LONG},
            {"seed": HOSTILE},
            {"seed": DIGITS},
            {"seed": nested(90)},
        )
    ),
]
CARDS = [
    *(
        Case(
            f"held_out {brief(value)}",
            fields(SPARSIFIED, {"held_out": value}),
            "the card leaves it out",
        )
        for value in (
            None,
            [],
            1,
            {},
            {"m": None},
            {"m": {}},
            {"m": {"perplexity": 9}},
            nested(90),
            {"m": {"perplexity": "9", "sparsity": 1}},
            {"m": {"perplexity": DIGITS, "sparsity": 1}},
            {"m original": {"perplexity": 0, "sparsity": 1}, "m": {"perplexity": 9, "sparsity": 1}},
        )
    ),
    *(
        Case(f"{name} {brief(value)}", fields(SPARSIFIED, {name: value}), "the card leaves it out")
        for name, value in (("model", 1), ("model", None), ("corpus", []), ("corpus", HOSTILE))
    ),
]
