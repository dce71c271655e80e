"""Broken records of runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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

NAME = "run.json"
SOUND: dict[str, Any] = {
    "command": "export",
    "options": {"model": "m", "predictors": "p", "out": "o", "vram_budget": None},
    "resolved": {},
    "directory": "/",
    "seed": None,
    "inputs": {},
    "result": None,
    "versions": {"python": "3.11.7", "sparsecast": "0.2.0"},
    "machine": {
        "system": "Linux x86_64",
        "cpu": "Abacus",
        "cpu_capability": "AVX2",
        "cores": 2,
        "threads": 1,
        "gpus": [],
        "processes": 1,
    },
    "date": "2026-01-02T03:04:05Z",
    "seconds": 1.5,
    "format_version": 1,
}


def write(folder: Path) -> Path:
    folder.mkdir()
    (folder / NAME).write_text(json.dumps(SOUND))
    return folder


def option(**values: Any) -> Any:
    return edited(NAME, lambda record: record["options"].update(values))


def machine(**values: Any) -> Any:
    return edited(NAME, lambda record: record["machine"].update(values))


RUNS = [
    *no_object(NAME),
    *(Case(f"no {name}", without(NAME, name), only=NAME) for name in SOUND),
    Case("a field more", fields(NAME, {"more": 1}), only=NAME),
    Case("a field twice", twice(NAME, "command", "rerun"), only=NAME),
    *(
        Case(f"{name} {brief(value)}", fields(NAME, {name: value}), only=NAME)
        for name, values in {
            "command": (None, 1, [], "", "rerun", "push", "bench engine", LONG, HOSTILE),
            "options": (None, [], "x", {}, {"a": 1}, {"model": nested(90)}, {LONG: 1}),
            "resolved": (None, [], 1, {"device": nested(90)}),
            "directory": (None, 1, "", "work", "../work", LONG, "/\x00", HOSTILE, "/\ud800"),
            "seed": (-1, 2**32, DIGITS, 1.5, True, "0", []),
            "inputs": (None, [], {"corpus": nested(90)}),
            "result": (1, [], LONG),
            "versions": (None, [], {"torch": 1}, {"torch": LONG}),
            "machine": (None, [], {}, nested(90)),
            "date": (None, 1, "", "yesterday", "2026-13-01T00:00:00Z", "2026-01-02", LONG),
            "seconds": (None, "1", -1, True, DIGITS),
            "format_version": (0, 2, DIGITS, "1", None, True),
        }.items()
        for value in values
    ),
    *(
        Case(f"machine: {name} {brief(value)}", machine(**{name: value}), only=NAME)
        for name, values in {
            "cpu": (None, 1, LONG),
            "threads": (None, 0, -1, 1.5, "1", DIGITS),
            "processes": (None, 0, DIGITS),
            "gpus": (None, "H200", [1], [LONG], nested(90)),
        }.items()
        for value in values
    ),
    *(
        Case(f"options: {name} {brief(value)}", option(**{name: value}), only=NAME)
        for name, values in {
            "model": (None, 1, [], {}, LONG, "a\x00b", "\ud800"),
            "out": (None, "", 1, ["o"], "o\x00"),
            "dtype": ("f64", 1, [], {"f16": 1}, True),
            "vram_budget": ("much", [1], DIGITS, True),
            "vram_context": (-1, 2**40, DIGITS, 1.5, None),
            "force": (None, 1, "true", []),
            "command": ("rm",),
            "__init__": (1,),
        }.items()
        for value in values
    ),
]
