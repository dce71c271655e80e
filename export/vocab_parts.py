"""What the readers of the two kinds of tokenizer hand on, before added tokens and padding."""

from __future__ import annotations

from dataclasses import dataclass, field

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
