"""The vocabulary of PowerInfer's file: one token per row of the embedding.

The engine knows two kinds. "llama" merges greedily by score, as sentencepiece's BPE does; "gpt2"
merges the bytes of words by a list of merges. Token types: 1 normal, 2 unknown, 3 control, 4 user
defined, 5 unused, 6 byte. (PowerInfer's llama.cpp at d3ebd7c, llm_load_vocab and its tokenizers.)
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, NamedTuple

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


class Vocabulary(NamedTuple):
    """One entry per row of the embedding."""

    model: str
    """llama or gpt2."""
    tokens: list[str]
    scores: list[float]
    """Empty for gpt2."""
    types: list[int]
    merges: list[str]
    """"left right", first merged first; empty for llama."""
    special: dict[str, int]
    """Ids of bos and eos, and of unk and pad where the tokenizer has them."""
    notes: list[str]
    """Sentences on how the engine treats text differently from the tokenizer."""
    differences: list[str] = []
    """What the tokenizer does to text and the engine never does: the user has to consent."""


@dataclass
class Parts:
    """A tokenizer's own tokens by id, before added tokens and padding; ids may have gaps."""

    model: str
    """llama or gpt2."""
    tokens: dict[int, str]
    types: dict[int, int]
    scores: dict[int, float] = field(default_factory=dict)
    merges: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    """See `Vocabulary`."""


def listed(steps: list[dict[str, Any]]) -> str:
    """Spell steps of a tokenizer in an error, shortened."""
    return ", ".join(json.dumps(step, ensure_ascii=False)[:120] for step in steps) or "nothing"


def steps_of(spec: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """List the steps of a tokenizer's `normalizer` or `pre_tokenizer`, sequences flattened."""
    return _flat(spec[name], {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers"}[name])


def _flat(step: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    return [flat for part in step[inner] for flat in _flat(part, inner)]
