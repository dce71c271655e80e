"""Check, on the file alone, that the engine can load the vocabulary.

GPT-2's alphabet is computed from its rule here; export takes it from the tokenizers library.
"""

from __future__ import annotations

from typing import Any

from sparsecast.export.checks.base import Check
from sparsecast.export.read.reader import GGUFFile
from sparsecast.export.read.vocab import NORMAL, alphabet

BYTES = {f"<0x{byte:02X}>" for byte in range(256)}


NEVER = (0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100))
"""Bytes that occur in no text: not UTF-8, or of unassigned planes."""


def check_vocabulary(file: GGUFFile) -> Check:
    """Check tokens, types, and scores or merges.

    Every row needs a unique token and a type, and every byte of text needs a token. Control
    characters may be missing: export names them.
    """
    bytewise = file.keys["tokenizer.ggml.model"] == "gpt2"
    third = "merges" if bytewise else "scores"
    columns = [file.keys.get(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type", third)]
    if not all(isinstance(column, list) for column in columns):
        return Check("vocabulary", False, f"tokens, token_type or {third} is missing or no array")
    tokens, types, others = (list(column or []) for column in columns)
    wrong = []
    if len(tokens) != len(types):
        wrong.append(f"{len(tokens)} tokens, {len(types)} types")
    if not all(isinstance(token, str) and token for token in tokens):
        return Check("vocabulary", False, "a token is empty or not a text")
    if len(set(tokens)) != len(tokens):
        wrong.append("a token is there twice")
    if not all(isinstance(kind, int) and 1 <= kind <= 6 for kind in types):
        wrong.append("a token type is not 1 to 6")
    wrong += (_wrong_bytes if bytewise else _wrong_pieces)(tokens, types, others)
    for kind in ("bos", "eos", "unknown", "padding"):
        if file.keys.get(f"tokenizer.ggml.{kind}_token_id", 0) >= len(tokens):
            wrong.append(f"{kind}_token_id is out of range")
    for kind in ("bos", "eos") if bytewise else ():
        if f"tokenizer.ggml.{kind}_token_id" not in file.keys:
            wrong.append(f"{kind}_token_id is missing, the engine would use token 11")
    detail = f"{len(tokens)} tokens" + (f", {len(others)} merges" if bytewise else "")
    return Check("vocabulary", not wrong, "; ".join(wrong) or detail)


def _wrong_pieces(tokens: list[str], types: list[int], scores: list[Any]) -> list[str]:
    wrong = []
    if len(scores) != len(tokens):
        wrong.append(f"{len(tokens)} tokens, {len(scores)} scores")
    if not all(isinstance(score, float) for score in scores):
        wrong.append("a score is not a float")
    if lost := BYTES - set(tokens):
        wrong.append(f"byte token {min(lost)} is missing")
    return wrong


def _wrong_bytes(tokens: list[str], types: list[int], merges: list[Any]) -> list[str]:
    wrong, known, characters = [], set(tokens), set(alphabet())
    order = alphabet()
    spare = {order[byte] for byte in (*range(9), 11, 12, *range(14, 32), *NEVER)}
    if lost := characters - known - spare:
        wrong.append(
            f"{len(lost)} characters of the byte alphabet are not tokens, {min(lost)!r} first"
        )
    for i, (token, kind) in enumerate(zip(tokens, types, strict=False)):
        if kind == NORMAL and not set(token) <= characters:
            wrong.append(f"token {i}, {token!r}, holds a character that stands for no byte")
            break
    for i, merge in enumerate(merges):
        parts = merge.split(" ") if isinstance(merge, str) else []
        if len(parts) != 2 or not {*parts, "".join(parts)} <= known:
            wrong.append(f"merge {i} is {merge!r}, expected two tokens that form a third")
            break
    return wrong
