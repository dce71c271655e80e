"""Compare the options of an earlier run with those of the present one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsecast.core.errors import InputError
from sparsecast.core.options import option_of, short_repr

ADDED = {"long_documents": "cut", "stages": "7b", "loss": "count"}
"""Options that runs of earlier versions lack, and what those versions did."""

MOST_SHOWN = 200


def compare_options(earlier: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Describe every option of `current` that an earlier run had with another value."""
    changes = []
    for name, value in current.items():
        was = earlier.get(name, ADDED.get(name))
        if was == value:
            continue
        change = f"{name} was {_shown(was)}, now {_shown(value)}"
        if name in ADDED and name not in earlier:
            change += f": give {option_of(name)} {was}, as runs before that option did"
        changes.append(change)
    return changes


def _shown(value: object) -> str:
    """Return a value's repr, shortened if it is longer than most paths."""
    text = repr(value)
    return text if len(text) <= MOST_SHOWN else short_repr(value)


def check_unchanged(folder: Path, content: str, changes: list[str], *, finished: bool) -> None:
    """Refuse to reuse or resume an earlier run that had other options.

    Args:
        folder: Output folder of a finished run, hidden work folder of an unfinished one.
        content: What the folder holds, such as "an unfinished run".
        changes: Result of `compare_options`.

    Raises:
        InputError: There are changes.
    """
    if changes:
        advice = (
            "choose another --out or remove the folder"
            if finished
            else "repeat the options it was started with, or remove that folder"
        )
        raise InputError(
            f"{folder}: holds {content} made differently ({'; '.join(changes)}); {advice}"
        )
