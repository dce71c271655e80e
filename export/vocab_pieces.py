"""Sentencepiece BPE: from tokenizer.model, or from the tokenizer.json that was made of one.

The engine puts one space before a text, turns spaces into U+2581 and then merges the neighbours
whose union has the highest score, leftmost first; what stays no token becomes bytes. Sentencepiece
scores a piece by its place in training: 0, -1, -2, ... A converted tokenizer.json has instead every
pair of pieces whose union is a piece as a merge, in the order of scores; the two are equivalent
only if all such pairs are there and those of one piece follow each other.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from sentencepiece import sentencepiece_model_pb2 as proto

from sparsecast.collect.errors import InputError
from sparsecast.export.vocab_parts import BYTE, CONTROL, NORMAL, UNKNOWN, USER, Parts

SPACE = "\u2581"
BYTES = {f"<0x{byte:02X}>" for byte in range(256)}
PREPENDED = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
    ],
}
METASPACE = {"type": "Metaspace", "replacement": SPACE, "split": False}


def model_pieces(path: Path) -> Parts:
    """Of a sentencepiece model: piece types are the engine's token types.

    Raises:
        InputError: No sentencepiece model, a unigram one, or one without byte pieces.
    """
    model = proto.ModelProto()  # type: ignore[attr-defined]  # made at import
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise InputError(
            f"{path}: not a sentencepiece model; copy the model's own tokenizer.model here"
        ) from error
    if model.trainer_spec.model_type != model.trainer_spec.BPE:
        raise InputError(
            f"{path}: is a unigram model, expected type BPE; the engine merges greedily by score "
            "and would cut text into other tokens than this model was trained on"
        )
    prepares = model.normalizer_spec
    if prepares.precompiled_charsmap or not prepares.add_dummy_prefix:
        name = prepares.name or "a rule of its own"
        raise InputError(
            f"{path}: prepares text by {name}, dummy prefix {prepares.add_dummy_prefix}, expected "
            "the identity and one space put in front; the engine does that and no more, so it "
            "would cut text into other tokens than this model was trained on"
        )
    parts = Parts(
        "llama",
        {i: piece.piece for i, piece in enumerate(model.pieces)},
        {i: int(piece.type) for i, piece in enumerate(model.pieces)},
        {i: piece.score for i, piece in enumerate(model.pieces)},
    )
    _check_bytes(path, parts)
    return parts


def json_pieces(path: Path, spec: dict[str, Any]) -> Parts:
    """Of a tokenizer.json with byte_fallback, scores by the order of its merges.

    Raises:
        InputError: Merges or treatment of spaces that no score expresses, or no byte pieces.
    """
    if (notes := space_notes(spec)) is None:
        steps = [spec[name] for name in ("normalizer", "pre_tokenizer") if spec[name]]
        found = ", ".join(json.dumps(step, ensure_ascii=False)[:120] for step in steps)
        raise InputError(
            f"{path}: prepares text by {found or 'nothing'}, expected one space put in front and "
            "spaces turned into U+2581; the engine does that and no more, so it would cut text "
            "into other tokens than this model was trained on"
        )
    model = spec["model"]
    ids: dict[str, int] = model["vocab"]
    special = {token["content"]: token["special"] for token in spec["added_tokens"]}
    unknown = model["unk_token"] or "<unk>"
    types = {}
    for text, i in ids.items():
        kind = UNKNOWN if text == unknown else BYTE if text in BYTES else NORMAL
        if kind == NORMAL and text in special:
            kind = CONTROL if special[text] else USER
        types[i] = kind
    scores = dict.fromkeys(ids.values(), 0.0)
    made = _made(path, model, {text for text, i in ids.items() if types[i] == NORMAL})
    rest = sorted(ids[text] for text in ids.keys() - set(made) if types[ids[text]] == NORMAL)
    for rank, i in enumerate([*(ids[text] for text in made), *rest]):
        scores[i] = -float(rank)
    parts = Parts("llama", {i: text for text, i in ids.items()}, types, scores, notes=notes)
    _check_bytes(path, parts)
    return parts


def _made(path: Path, model: dict[str, Any], normal: set[str]) -> list[str]:
    """The pieces that merges make, first made first.

    Raises:
        InputError: Merges that a greedy search by score would not reproduce.
    """
    merges = [(left, right) for left, right in model["merges"]]
    made = list(dict.fromkeys(left + right for left, right in merges))
    known = set(merges)
    runs = 1 + sum(a + b != c + d for (a, b), (c, d) in pairwise(merges))
    split = next(
        (
            (text[:at], text[at:])
            for text in normal
            for at in range(1, len(text))
            if text[:at] in normal and text[at:] in normal and (text[:at], text[at:]) not in known
        ),
        None,
    )
    if merges and runs > len(made):
        what = "merges of one piece are apart"
    elif split is not None:
        what = f"{split[0]!r} and {split[1]!r} make a piece, but are no merge"
    else:
        return made
    raise InputError(
        f"{path}: its {what}, expected the merges of a sentencepiece model; the engine merges "
        "by score whatever makes a piece and would cut text into other tokens. If the model has "
        "a tokenizer.model, put it beside this file"
    )


def space_notes(spec: dict[str, Any]) -> list[str] | None:
    """What the engine does otherwise with spaces; None where that changes every text."""
    steps = (spec["normalizer"], spec["pre_tokenizer"])
    if steps == (PREPENDED, None):
        return []
    if steps in [(None, METASPACE | {"prepend_scheme": when}) for when in ("first", "always")]:
        return ["The engine also puts a space before a text that begins with one."]
    return None


def _check_bytes(path: Path, parts: Parts) -> None:
    present = {parts.tokens[i] for i, kind in parts.types.items() if kind == BYTE}
    if absent := BYTES - present:
        raise InputError(
            f"{path}: has no byte piece {min(absent)}; the engine needs all 256 for text that no "
            "piece covers. Train the tokenizer with byte_fallback"
        )
