"""Sentencepiece's BPE expressed in the tokenizers library.

Sentencepiece merges the neighbors whose union has the highest score, the leftmost among equals. The
library needs a distinct rank for every merge. Among pieces of equal score, such as Llama 2's runs
of spaces, the merge with the longest left part goes first: that grows a run from its left end, as
sentencepiece does. No order of ranks is right for every set of pieces, so the result is compared
with sentencepiece on the texts where the order matters.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import sentencepiece
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from sentencepiece import sentencepiece_model_pb2 as proto
from tokenizers import Tokenizer
from tokenizers.models import BPE

from sparsecast.core.errors import InputError, reason_of
from sparsecast.core.files import read_bytes

NORMAL, USER = 1, 4
SPACE = "\u2581"
MOST_TEXTS = 50_000
"""Compared with sentencepiece: a second's work."""

Merge = tuple[str, str]


def read_model(path: Path) -> Any:
    """Parse a tokenizer.model's protobuf.

    Raises:
        InputError: No such file, no sentencepiece model, part of one, or one that sentencepiece
            itself does not load.
    """
    model = proto.ModelProto()  # type: ignore[attr-defined]  # made at import
    try:
        model.ParseFromString(read_bytes(path, "a sentencepiece model"))
    except DecodeError as error:
        raise InputError(
            f"{path}: not a sentencepiece model; copy the model's own tokenizer.model here"
        ) from error
    if not model.pieces or not model.HasField("trainer_spec"):
        raise InputError(
            f"{path}: has {len(model.pieces)} pieces and no word of their kind, expected a whole "
            "sentencepiece model; download it again"
        )
    try:
        _processor(model)
    except RuntimeError as error:
        raise InputError(
            f"{path}: sentencepiece refuses it ({reason_of(error)}); copy the model's "
            "own tokenizer.model here"
        ) from error
    return model


def _processor(model: Any) -> Any:
    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())


def is_bpe(model: Any) -> bool:
    kind: bool = model.trainer_spec.model_type == model.trainer_spec.BPE
    return kind


def adds_one_space(model: Any) -> bool:
    """Return whether text is prepared as Llama's: one space in front, spaces as U+2581."""
    rules = model.normalizer_spec
    spaces = rules.add_dummy_prefix and rules.escape_whitespaces
    changes = rules.precompiled_charsmap or rules.remove_extra_whitespaces
    return bool(spaces and not changes and not model.trainer_spec.treat_whitespace_as_suffix)


def scores_of(model: Any) -> dict[str, float]:
    """Return the scores of the pieces that merges make."""
    return {piece.piece: piece.score for piece in model.pieces if piece.type == NORMAL}


def merges_by_score(scores: Mapping[str, float]) -> list[Merge]:
    """Return every pair of pieces that makes a piece, in merge order."""
    pairs = [pair for text in scores for pair in _pairs(text, scores)]
    return sorted(pairs, key=lambda pair: (-scores["".join(pair)], -len(pair[0]), -len(pair[1])))


def _pairs(text: str, pieces: Mapping[str, float]) -> Iterator[Merge]:
    for at in range(1, len(text)):
        if text[:at] in pieces and text[at:] in pieces:
            yield text[:at], text[at:]


def find_mismatch(vocab: Mapping[str, int], merges: list[Merge], model: Any) -> str | None:
    """Find a text that `merges` split differently than the sentencepiece model; None if none.

    Args:
        vocab: Ids of the pieces.
        model: A protobuf of type BPE.

    None means that merges follow the scores, and that both tokenizers agree wherever two merges of
    one score share a piece. Only the first `MOST_TEXTS` such places are compared.
    """
    scores = scores_of(model)
    wanted = merges_by_score(scores)
    if odd := set(merges) ^ set(wanted):
        return "".join(min(odd))
    made = [left + right for left, right in merges]
    for first, then in pairwise(made):
        if scores[first] < scores[then]:
            return then
    bytewise = model.trainer_spec.byte_fallback
    own = Tokenizer(BPE(dict(vocab), merges, fuse_unk=True, byte_fallback=bytewise))
    bare = proto.ModelProto()  # type: ignore[attr-defined]
    bare.CopyFrom(model)
    bare.normalizer_spec.Clear()
    bare.normalizer_spec.add_dummy_prefix = False
    bare.normalizer_spec.remove_extra_whitespaces = False
    theirs = _processor(bare)
    for text in islice(_doubtful(merges, scores), MOST_TEXTS):
        for spaced in (text, SPACE + text):
            ours = own.encode(spaced, add_special_tokens=False).tokens
            if ours != theirs.encode_as_pieces(spaced):
                return text
    return None


def _doubtful(merges: Iterable[Merge], scores: Mapping[str, float]) -> Iterator[str]:
    """Texts x y z where xy and yz are pieces of one score, and pieces with a character that is no
    piece, which the library never puts together."""
    for text in scores:
        if not all(character in scores for character in text):
            yield text
    by_score: dict[float, list[Merge]] = defaultdict(list)
    for left, right in merges:
        by_score[scores[left + right]].append((left, right))
    seen = set()
    for group in by_score.values():
        rights: dict[str, list[str]] = defaultdict(list)
        for left, right in group:
            rights[left].append(right)
        for left, middle in group:
            for right in rights.get(middle, ()):
                if (text := left + middle + right) not in seen:
                    seen.add(text)
                    yield text
