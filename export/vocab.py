"""The vocabulary as PowerInfer's engine reads it, from a sentencepiece model.

Piece types of sentencepiece and token types of GGUF are the same numbers: 1 normal, 2 unknown,
3 control, 4 user defined, 5 unused, 6 byte. The engine merges greedily by score, which is
sentencepiece's BPE type; a unigram model gives other tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from sentencepiece import sentencepiece_model_pb2 as proto

from sparsecast.collect.checkpoint import Checkpoint
from sparsecast.collect.errors import InputError
from sparsecast.collect.models import load_tokenizer

CONTROL, USER, UNUSED, BYTE = 3, 4, 5, 6


class Vocabulary(NamedTuple):
    """One entry per row of the embedding."""

    tokens: list[str]
    scores: list[float]
    types: list[int]
    special: dict[str, int]
    """bos, eos, unk, pad, as far as the tokenizer has them."""


def read_vocabulary(checkpoint: Checkpoint, size: int) -> Vocabulary:
    """The pieces of tokenizer.model, then added tokens, then padding up to `size`.

    Raises:
        InputError: No tokenizer.model, a unigram one, or one that the engine would misread.
    """
    path = checkpoint.folder / "tokenizer.model"
    pieces = _pieces(path)
    tokens = [piece.piece for piece in pieces]
    scores = [piece.score for piece in pieces]
    types = [int(piece.type) for piece in pieces]
    tokenizer: Any = load_tokenizer(checkpoint)
    if len(tokens) > size:
        raise InputError(
            f"{path}: has {len(tokens)} pieces, but the model's embedding has {size} rows; give "
            "the tokenizer of this model"
        )
    added = tokenizer.added_tokens_decoder
    for i in range(len(tokens), size):
        token = added.get(i)
        tokens.append(token.content if token else f"<unused_{i}>")
        scores.append(0.0)
        types.append(UNUSED if token is None else CONTROL if token.special else USER)
    _check(path, tokens, types)
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    special = {name: i for name, i in ids.items() if i is not None and 0 <= i < size}
    return Vocabulary(tokens, scores, types, special)


def _pieces(path: Any) -> Any:
    if not path.is_file():
        raise InputError(
            f"{path}: no such file, expected the sentencepiece model beside the weights; export "
            "writes no other kind of vocabulary yet"
        )
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
    return model.pieces


def _check(path: Any, tokens: list[str], types: list[int]) -> None:
    present = {token for token, kind in zip(tokens, types, strict=True) if kind == BYTE}
    if absent := {f"<0x{byte:02X}>" for byte in range(256)} - present:
        raise InputError(
            f"{path}: has no byte piece {min(absent)}; the engine needs all 256 for text that no "
            "piece covers. Train the tokenizer with byte_fallback"
        )
    seen: set[str] = set()
    for token in tokens:
        if not token or token in seen:
            raise InputError(
                f"{path}: token {token!r} is empty or stands twice, which the engine refuses; "
                "give every row of the embedding its own text"
            )
        seen.add(token)
