"""Suggestions for misspelled names."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(found: str, known: Iterable[str]) -> str:
    """Return `; did you mean X?`, or an empty text if no known name is similar."""
    near = get_close_matches(found.replace("_", "-"), list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""
