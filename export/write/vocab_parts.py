"""What the readers of the two kinds of tokenizer share, and what they hand on, before added tokens
and padding."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


@dataclass
class Parts:
    """A tokenizer's own tokens by id; ids may have gaps."""

    model: str
    """llama or gpt2."""
    tokens: dict[int, str]
    types: dict[int, int]
    scores: dict[int, float] = field(default_factory=dict)
    merges: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def steps_of(spec: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The steps of a tokenizer's `normalizer` or `pre_tokenizer`; a sequence of none is none."""
    return _flat(spec[name], {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers"}[name])


def _flat(step: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    return [flat for part in step[inner] for flat in _flat(part, inner)]
