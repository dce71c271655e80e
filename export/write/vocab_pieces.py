"""Read sentencepiece BPE from tokenizer.model, or from a tokenizer.json converted from one.

The engine puts one space before a text, turns spaces into U+2581 and then merges the neighbors
whose union has the highest score, leftmost first; what is left over becomes bytes. Sentencepiece
scores a piece by its rank in training: 0, -1, -2, ... A converted tokenizer.json instead lists
every pair of pieces whose union is a piece as a merge, in the order of scores. The two are
equivalent only if all such pairs are there. Pieces whose merges alternate had the same score, as
Llama 2's runs of spaces: their order of merges must give the same result as leftmost first. Where
the two are not equivalent, or text is prepared in another way, the user has to accept it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2 as proto

from sparsecast.core.errors import InputError
from sparsecast.core.tokenizers.sentencepiece_bpe import (
    SPACE,
    adds_one_space,
    find_mismatch,
    is_bpe,
    merges_by_score,
    read_model,
)
from sparsecast.export.write.vocab import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER,
    Parts,
    listed,
    steps_of,
)

BYTES = {f"<0x{byte:02X}>" for byte in range(256)}
PREPENDED = [
    {"type": "Prepend", "prepend": SPACE},
    {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
]
METASPACE = {"type": "Metaspace", "replacement": SPACE, "split": False}


def model_pieces(path: Path) -> Parts:
    """Read a sentencepiece model; its piece types are the engine's token types.

    Raises:
        InputError: No sentencepiece model, a unigram one, or one without byte pieces.
    """
    model = read_model(path)
    if not is_bpe(model):
        raise InputError(
            f"{path}: is a unigram model, expected type BPE; the engine merges greedily by score "
            "and would split text into other tokens than this model was trained on"
        )
    differences = []
    if not adds_one_space(model):
        prepares = model.normalizer_spec
        name = prepares.name or "a rule of its own"
        differences.append(
            f"prepares text by {name}, dummy prefix {prepares.add_dummy_prefix}, removal of spaces "
            f"{prepares.remove_extra_whitespaces} instead of one space put in front"
        )
    parts = Parts(
        "llama",
        {i: piece.piece for i, piece in enumerate(model.pieces)},
        {i: int(piece.type) for i, piece in enumerate(model.pieces)},
        {i: piece.score for i, piece in enumerate(model.pieces)},
        differences=differences,
    )
    _check_bytes(path, parts)
    return parts


def json_pieces(path: Path, spec: dict[str, Any]) -> Parts:
    """Read a tokenizer.json with byte_fallback; scores follow the order of its merges.

    Raises:
        InputError: No byte pieces.
    """
    notes, differences = space_notes(spec)
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
    merges = [(left, right) for left, right in model["merges"]]
    by_merges = {left + right for left, right in merges}
    pieces = {text: i for text, i in ids.items() if types[i] == NORMAL or text in by_merges}
    groups = _groups(merges)
    groups += [[text] for text in sorted(pieces.keys() - by_merges, key=ids.__getitem__)]
    scores, rank = dict.fromkeys(ids.values(), 0.0), 0
    for group in groups:
        scores |= dict.fromkeys((ids[text] for text in group), -float(rank))
        rank += len(group)
    differences += _merge_differences(ids, merges, {text: scores[i] for text, i in pieces.items()})
    parts = Parts(
        "llama",
        {i: text for text, i in ids.items()},
        types,
        scores,
        notes=notes,
        differences=differences,
    )
    _check_bytes(path, parts)
    return parts


def _groups(merges: list[tuple[str, str]]) -> list[list[str]]:
    """Group the pieces by score, in the order of merges; alternating pieces share a group."""
    last = {left + right: i for i, (left, right) in enumerate(merges)}
    groups: list[list[str]] = []
    end = -1
    for i, (left, right) in enumerate(merges):
        piece = left + right
        if i > end:
            groups.append([])
        if piece not in groups[-1]:
            groups[-1].append(piece)
        end = max(end, last[piece])
    return groups


def _merge_differences(
    ids: dict[str, int], merges: list[tuple[str, str]], scores: dict[str, float]
) -> list[str]:
    """Say where a greedy search by score would not reproduce the merges."""
    known = set(merges)
    split = next((pair for pair in merges_by_score(scores) if pair not in known), None)
    if split is not None:
        what = f"no merge for the pieces {split[0]!r} and {split[1]!r}, which form a piece"
    elif (text := find_mismatch(ids, merges, _model(scores))) is not None:
        what = f"merges that split {text!r} as no scores can, the leftmost of equal ones first"
    else:
        return []
    return [f"has {what} (if the model has a tokenizer.model, put it beside this file)"]


def _model(scores: dict[str, float]) -> Any:
    """Build a sentencepiece model of these pieces and all bytes."""
    model = proto.ModelProto()  # type: ignore[attr-defined]  # created at import
    model.pieces.add(piece="<unk>", type=UNKNOWN)
    for text, score in scores.items():
        model.pieces.add(piece=text, score=score, type=NORMAL)
    for text in sorted(BYTES):
        model.pieces.add(piece=text, type=BYTE)
    spec = model.trainer_spec
    spec.model_type, spec.byte_fallback = spec.BPE, True
    model.normalizer_spec.remove_extra_whitespaces = False
    return model


def space_notes(spec: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Say how the engine treats spaces differently: notes, and differences in every text."""
    steps = steps_of(spec, "normalizer"), steps_of(spec, "pre_tokenizer")
    if steps == (PREPENDED, []):
        return [], []
    if steps in [([], [METASPACE | {"prepend_scheme": when}]) for when in ("first", "always")]:
        return ["The engine also puts a space before a text that begins with one."], []
    return [], [
        f"prepares text by {listed(sum(steps, []))} instead of one space put in front and spaces "
        "turned into U+2581"
    ]


def _check_bytes(path: Path, parts: Parts) -> None:
    present = {parts.tokens[i] for i, kind in parts.types.items() if kind == BYTE}
    if absent := BYTES - present:
        raise InputError(
            f"{path}: has no byte piece {min(absent)}; the engine needs all 256 for text that no "
            "piece covers. Train the tokenizer with byte_fallback"
        )
