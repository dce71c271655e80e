"""Read GPT-2's byte-level BPE from the JSON of a tokenizer.

The engine splits text into words by hand-written rules that imitate GPT-2's regular expression
(export/read/words.py), writes their bytes in GPT-2's alphabet of 256 printable characters and
applies the list of merges in order. It normalizes nothing, and takes no word whole
(`ignore_merges`): what a tokenizer does otherwise is a difference that the user has to accept. It
aborts when it prints a token of type 1 with a character outside the alphabet. (PowerInfer's
llama.cpp at d3ebd7c, llm_tokenizer_bpe.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

from sparsecast.core.errors import InputError
from sparsecast.export.write.vocab import NORMAL, Parts, steps_of

ALPHABET = frozenset(ByteLevel.alphabet())
_HIGH = (*range(0xC0, 0xC2), *range(0xF1, 0xF3), *range(0xF5, 0x100))
"""Bytes that UTF-8 never contains, and those that begin a character of an unassigned plane."""
CONTROLS = {chr(256 + byte): byte for byte in range(32) if byte not in b"\t\n\r"}
"""GPT-2's characters for control bytes other than tab and line breaks, with the byte."""
SPARE = frozenset(CONTROLS) | frozenset(map(chr, _HIGH))
"""Characters that a tokenizer trained without the whole alphabet may lack."""
FALCON = ["Punctuation", "ByteLevel", "Digits", "Split('[0-9][0-9][0-9]')"]


def is_byte_level(spec: dict[str, Any]) -> bool:
    """Whether the tokenizer works on bytes."""
    return any(step["type"] == "ByteLevel" for step in steps_of(spec, "pre_tokenizer"))


def byte_vocabulary(path: Path, spec: dict[str, Any]) -> Parts:
    """Read tokens and merges; added tokens are left to the caller.

    Raises:
        InputError: Tokens that the engine cannot put together or print, no merges, or an alphabet
            that lacks more than `SPARE`.
    """
    notes = _split_notes(spec)
    model = spec["model"]
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model[option]:
            raise InputError(
                f"{path}: its model has {option} {model[option]!r}, expected none; the engine "
                "does not support it and would split text into other tokens"
            )
    added = {token["content"] for token in spec["added_tokens"]}
    own = {text: i for text, i in model["vocab"].items() if text not in added}
    if absent := ALPHABET - own.keys() - SPARE:
        raise InputError(
            f"{path}: {len(absent)} of the characters that stand for bytes of text are not "
            f"tokens, {min(absent)!r} first; the engine fails on text with them. Train the "
            "tokenizer with the whole alphabet (BpeTrainer's initial_alphabet)"
        )
    if controls := sorted(CONTROLS.keys() - own.keys(), key=CONTROLS.__getitem__):
        codes = ", ".join(f"0x{CONTROLS[character]:02x}" for character in controls)
        notes.append(
            f"The vocabulary has no token for the control characters {codes}: transformers drops "
            "them, the engine aborts on a text with one. Strip them from prompts."
        )
    for text, i in own.items():
        if strange := set(text) - ALPHABET:
            raise InputError(
                f"{path}: token {i}, {text!r}, holds {min(strange)!r}, which stands for no byte; "
                "the engine aborts when it prints such a token. Make it an added token"
            )
    if not (merges := [f"{left} {right}" for left, right in model["merges"]]):
        raise InputError(
            f"{path}: has no merges, which the engine refuses to load; copy the tokenizer's own "
            "tokenizer.json, or its vocab.json and merges.txt, here"
        )
    tokens = {i: text for text, i in own.items()}
    types = dict.fromkeys(tokens, NORMAL)
    return Parts("gpt2", tokens, types, merges=merges, notes=notes, differences=_differences(spec))


def _differences(spec: dict[str, Any]) -> list[str]:
    found = []
    if normalizers := steps_of(spec, "normalizer"):
        found.append(f"normalizes text ({', '.join(step['type'] for step in normalizers)})")
    names = _names(spec)
    if names not in (["ByteLevel"], FALCON):
        found.append(f"splits text by {', '.join(names)} instead of GPT-2's ByteLevel alone")
    if spec["model"]["ignore_merges"]:
        found.append("takes a word whole where it is a token (ignore_merges)")
    return found


def _split_notes(spec: dict[str, Any]) -> list[str]:
    steps = steps_of(spec, "pre_tokenizer")
    spaced = next(step["add_prefix_space"] for step in steps if step["type"] == "ByteLevel")
    notes = []
    if _names(spec) == FALCON:
        notes.append(
            "The engine does not split around punctuation and after three digits as Falcon's "
            "tokenizer does, so such text becomes other tokens than the model was trained on."
        )
    if spaced:
        notes.append("The tokenizer puts a space before a text, the engine does not.")
    return notes


def _names(spec: dict[str, Any]) -> list[str]:
    return [_described(step) for step in steps_of(spec, "pre_tokenizer")]


def _described(step: dict[str, Any]) -> str:
    name: str = step["type"]
    if name == "Split":
        ((_, pattern),) = step["pattern"].items()
        return f"Split({pattern[:60]!r})".replace(r"\\", "\\")
    return "ByteLevel without its regex" if not step.get("use_regex", True) else name
