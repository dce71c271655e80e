"""Find and check the tokenizer files of a model's folder."""

from __future__ import annotations

import os
import re
from base64 import b64decode
from pathlib import Path
from typing import Any

from sparsecast.core.errors import InputError
from sparsecast.core.files import check_file, read_bytes, read_json
from sparsecast.core.manifests import is_count
from sparsecast.core.models.weight_files import refuse_lfs_pointer
from sparsecast.core.options import short_repr

MODEL = "tokenizer.model"
WHOLE = ("tokenizer.json", "*.model", "*.tiktoken", "vocab.txt", "tekken.json")
"""Files that each hold a complete tokenizer."""
PAIR = ("vocab.json", "merges.txt")
MOST_IDS = 2**21
"""Ids are below this, which is far above any vocabulary: libraries make tables as long as the
largest id."""
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def check_files(folder: Path) -> None:
    """Refuse a folder without a tokenizer: transformers would make an empty one.

    Raises:
        InputError: No tokenizer, an incomplete one, or a file that cannot be read.
    """
    found = sorted(path for pattern in WHOLE for path in folder.glob(pattern))
    halves = [folder / name for name in PAIR if os.path.lexists(folder / name)]
    for path in [*found, *halves]:
        check_file(path, "a tokenizer")
        refuse_lfs_pointer(path)
        if not path.stat().st_size:
            raise InputError(f"{path}: is empty, expected a tokenizer; download it again")
    if os.path.lexists(folder / WHOLE[0]):
        _check_character_maps(folder / WHOLE[0])
    for name in SETTINGS:
        if os.path.lexists(folder / name):
            read_json(folder / name, "a tokenizer's settings")
    if not found and len(halves) == 1:
        (other,) = {*PAIR} - {halves[0].name}
        raise InputError(
            f"{folder}: has {halves[0].name} without {other}, expected both; copy the other from "
            "where the model comes from"
        )
    if not found and not halves:
        raise InputError(
            f"{folder}: no tokenizer files, expected tokenizer.json, tokenizer.model, or vocab.json"
            " and merges.txt in it; copy them from where the model comes from"
        )
    if not found:
        _check_merges(*halves)


def _check_character_maps(path: Path) -> None:
    """Raise `InputError` unless each map of characters in tokenizer.json is as long as it says.

    The tokenizers library aborts the process otherwise. A map is in base64: the bytes of its trie
    as a u32, the trie in units of four bytes, and then the texts (sentencepiece's normalizer.cc).
    """
    left: list[Any] = [read_json(path, "a tokenizer")]
    while left:
        item = left.pop()
        if isinstance(item, dict) and (text := item.get("precompiled_charsmap")) is not None:
            try:
                raw = b64decode(text, validate=True)
            except (TypeError, ValueError):
                raw = b""
            size = int.from_bytes(raw[:4], "little")
            if len(raw) < 8 or not 4 <= size <= len(raw) - 4 or size % 4:
                raise InputError(
                    f"{path}: its precompiled_charsmap has {len(raw):,} bytes, of which the trie "
                    f"is said to take {size:,}; copy the model's own tokenizer.json here"
                )
        left += item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()


def sentencepiece_file(folder: Path) -> Path | None:
    """Return tokenizer.model unless it is in tiktoken's format, as Llama 3's is."""
    path = folder / MODEL
    return path if path.exists() and not _is_tiktoken(path) else None


def settings_of(folder: Path) -> dict[str, Any]:
    """Read tokenizer_config.json if there is one."""
    path = folder / SETTINGS[0]
    return read_json(path, "a tokenizer's settings") if path.exists() else {}


def _is_tiktoken(path: Path) -> bool:
    with path.open("rb") as file:
        return re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", file.read(1024)) is not None


def _check_merges(vocab: Path, merges: Path) -> None:
    """Raise `InputError` if no merge makes most pieces of the vocabulary."""
    pieces = read_json(vocab, "the pieces of a tokenizer and their ids")
    if odd := next(
        (p for p, i in pieces.items() if not is_count(i, least=0) or i >= MOST_IDS), None
    ):
        raise InputError(
            f"{vocab}: the id of {short_repr(odd)} is {short_repr(pieces[odd])}, expected a whole "
            f"number from 0 to {MOST_IDS - 1:,}; download the file again"
        )
    text = read_bytes(merges, "the merges of a tokenizer").decode("utf-8", errors="replace")
    made = {line.replace(" ", "") for line in text.split("\n")}
    longer = [piece for piece in pieces if len(piece) > 1]
    if (count := sum(piece in made for piece in longer)) < len(longer) / 2:
        raise InputError(
            f"{merges}: makes {count} of the {len(longer)} longer pieces in vocab.json; it is not "
            "whole, or belongs to another tokenizer: copy both from where the model comes from"
        )
