"""Byte-level BPE as GPT-2 has it, from the JSON of a tokenizer.

The engine cuts text into words by hand-written rules that stand for GPT-2's regular expression,
writes their bytes in GPT-2's alphabet of 256 printable characters and merges by the list, first
merge first. It normalises nothing. A token of type 1 that holds another character ends it as soon
as it prints that token. (PowerInfer's llama.cpp at d3ebd7c, llm_tokenizer_bpe.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

from sparsecast.collect.errors import InputError
from sparsecast.export.vocab_parts import NORMAL, Parts, steps_of

ALPHABET = frozenset(ByteLevel.alphabet())
FALCON = ["Punctuation", "ByteLevel", "Digits", "Split('[0-9][0-9][0-9]')"]


def is_byte_level(spec: dict[str, Any]) -> bool:
    return any(step["type"] == "ByteLevel" for step in steps_of(spec, "pre_tokenizer"))


def byte_vocabulary(path: Path, spec: dict[str, Any]) -> Parts:
    """Tokens and merges; added tokens are left to the caller.

    Raises:
        InputError: Text is normalised or cut otherwise than GPT-2 does, or the alphabet has gaps.
    """
    notes = _cut_notes(path, spec)
    model = spec["model"]
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        if model[option]:
            raise InputError(
                f"{path}: its model has {option} {model[option]!r}, expected none; the engine "
                "knows no such thing and would cut text into other tokens"
            )
    added = {token["content"] for token in spec["added_tokens"]}
    own = {text: i for text, i in model["vocab"].items() if text not in added}
    if absent := ALPHABET - own.keys():
        raise InputError(
            f"{path}: {len(absent)} of the 256 characters that stand for bytes are no tokens, "
            f"{min(absent)!r} first; the engine fails on text that holds them. Train the "
            "tokenizer with the whole alphabet (BpeTrainer's initial_alphabet)"
        )
    for text, i in own.items():
        if strange := set(text) - ALPHABET:
            raise InputError(
                f"{path}: token {i}, {text!r}, holds {min(strange)!r}, which stands for no byte; "
                "the engine ends when it prints such a token. Make it an added token"
            )
    if not (merges := [f"{left} {right}" for left, right in model["merges"]]):
        raise InputError(
            f"{path}: has no merges, which the engine refuses to load; copy the tokenizer's own "
            "tokenizer.json, or its vocab.json and merges.txt, here"
        )
    tokens = {i: text for text, i in own.items()}
    return Parts("gpt2", tokens, dict.fromkeys(tokens, NORMAL), merges=merges, notes=notes)


def _cut_notes(path: Path, spec: dict[str, Any]) -> list[str]:
    if normalizers := steps_of(spec, "normalizer"):
        kinds = ", ".join(step["type"] for step in normalizers)
        raise InputError(
            f"{path}: normalises text ({kinds}), which the engine does not; expected "
            "a byte-level BPE without normalizer, as GPT-2's"
        )
    steps = steps_of(spec, "pre_tokenizer")
    names = [_described(step) for step in steps]
    spaced = next(step["add_prefix_space"] for step in steps if step["type"] == "ByteLevel")
    notes = []
    if names == FALCON:
        notes.append(
            "The engine does not make Falcon's own cuts around punctuation and after three "
            "digits, so it cuts such text into other tokens than the model was trained on."
        )
    elif names != ["ByteLevel"]:
        raise InputError(
            f"{path}: cuts text by {', '.join(names)}, expected GPT-2's ByteLevel; the engine "
            "cannot cut as llama3, qwen2 or another of the kind and would make other tokens, so "
            "this model cannot run there"
        )
    if spaced:
        notes.append("The tokenizer puts a space before a text, the engine does not.")
    return notes


def _described(step: dict[str, Any]) -> str:
    name: str = step["type"]
    if name == "Split":
        ((_, pattern),) = step["pattern"].items()
        return f"Split({pattern[:60]!r})"
    return "ByteLevel without its regex" if not step.get("use_regex", True) else name
