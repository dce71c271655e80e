"""Tokenize documents into padded batches.

Every sequence starts with exactly one BOS where the tokenizer has one (its absence is the classic
cause of abnormal activations in these models), and none is packed with another: what is recorded at
a position is what the model computes there when it reads that sequence alone.

A text longer than the sequence length becomes consecutive windows, each behind a BOS of its own
("split"), or its first window alone ("cut"). A chat is always cut: a window that begins within a
turn, without the template's header, is nothing that the model sees.

Shape letters: B batch, S sequence.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from sparsecast.core.errors import InputError, reason_of
from sparsecast.core.text.corpus import Document, LongDocuments
from sparsecast.core.text.rows import UnusableRowError
from sparsecast.core.text.skipped import GIVE_UP, SkippedRows
from sparsecast.core.text.splits import SPLITS
from sparsecast.core.text.windows import ids_by_parts, windows

COUNTED = "counted"
"""Takes training documents once the training split is full; its tokens are only counted."""
WINDOW = 16
"""Batches whose sequences are sorted by length together."""


@dataclass(frozen=True, slots=True)
class Sequence:
    """Token ids of a document, or of one of its windows."""

    split: str
    ids: list[int]
    truncated: bool
    """Whether more of the document follows."""
    first: bool = True
    """Whether the document begins here."""


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Sequences of one split, padded on the right."""

    split: str
    ids_BS: Tensor
    """int64."""
    keep_BS: Tensor
    """Bool; False is padding."""

    @property
    def tokens(self) -> int:
        return int(self.keep_BS.sum())

    def to(self, device: torch.device) -> TokenBatch:
        return TokenBatch(
            self.split, to_device(self.ids_BS, device), to_device(self.keep_BS, device)
        )


def to_device(value: Tensor, device: torch.device) -> Tensor:
    """Copy from the CPU without waiting for the GPU's queued work."""
    if device.type != "cuda":
        return value.to(device)
    return value.pin_memory().to(device, non_blocking=True)


def encode(tokenizer: Tokenizer, text: str, seq_len: int) -> list[int]:
    """Tokenize a text to at most `seq_len` ids, BOS included exactly once.

    A literal `<s>` in the text is text, not a second BOS.
    """
    return with_bos(tokenizer, _ids_of(tokenizer, text))[:seq_len]


def _ids_of(tokenizer: Tokenizer, text: str, literal: bool = True) -> list[int]:
    """Tokenize without special tokens at the ends; `literal`: those in the text are text."""
    got = tokenizer(text, add_special_tokens=False, split_special_tokens=literal, verbose=False)
    return list(got["input_ids"])


def encode_document(
    tokenizer: Tokenizer, doc: Document, seq_len: int, *, prompt: bool = False
) -> list[int]:
    """Encode a document; a chat goes through the tokenizer's template, with one BOS.

    Special tokens are those that the template writes; one that somebody spells out is text.

    Args:
        prompt: End a chat with what the template writes for the assistant to answer.

    Raises:
        UnusableRowError: A chat and no template, or one that the template refuses.
    """
    if doc.chat is None:
        return encode(tokenizer, doc.text, seq_len)
    if not tokenizer.chat_template:
        raise UnusableRowError(
            f"a chat, but the tokenizer of {tokenizer.name_or_path} has no chat template; add the "
            "model's chat_template.jinja, or give plain text under 'text'"
        )
    # A special token that somebody spells out passes the template as a stand-in.
    written = "\n".join((doc.text, *(role for role, _ in doc.chat)))
    spelled = [said for said in _specials(tokenizer) if said in written]
    stand_ins = {f"\ue000{place}\ue001": said for place, said in enumerate(spelled)}
    turns = []
    for role, content in doc.chat:
        for stand_in, said in stand_ins.items():
            role, content = role.replace(said, stand_in), content.replace(said, stand_in)
        turns.append({"role": role, "content": content})
    try:
        text = str(
            tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)
        )
    except Exception as error:  # a template raises what it likes
        raise UnusableRowError(
            f"the chat template refuses the chat that begins {doc.text[:40]!r} "
            f"({reason_of(error)}); change its roles"
        ) from error
    parts = re.split(f"({'|'.join(stand_ins)})", text) if stand_ins else [text]
    ids: list[int] = []
    for part in parts:
        literal = part in stand_ins
        ids_of = partial(_ids_of, tokenizer, literal=literal)
        for more in ids_by_parts(ids_of, stand_ins.get(part, part)):
            if len(ids) < 2:  # the template may write a BOS, or several
                ids = with_bos(tokenizer, ids + more)
            else:
                ids += more
            if len(ids) >= seq_len:
                return ids[:seq_len]
    return ids


def _specials(tokenizer: Tokenizer) -> list[str]:
    """Return the special tokens' texts, longest first."""
    added = tokenizer.added_tokens_decoder.values()
    return sorted((token.content for token in added if token.special), key=len, reverse=True)


def with_bos(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """Return `ids` with exactly one BOS in front if the tokenizer has one."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return list(ids)
    start = 0
    while start < len(ids) and ids[start] == bos:
        start += 1
    return [bos, *ids[start:]]


def split_quotas(tokens: int, counted: int = 0) -> dict[str, int]:
    """Divide `tokens` over the splits, 90/5/5; `counted` more are for statistics only."""
    small = max(1, round(0.05 * tokens))
    train = max(1, tokens - 2 * small)
    shares = {"train": train, "calibration": small, "held-out": small}
    return {**shares, COUNTED: counted} if counted else shares


def tokenize_documents(
    docs: Iterable[tuple[str, Document]],
    tokenizer: Tokenizer,
    quota: Mapping[str, int],
    seq_len: int,
    vocabulary: float = float("inf"),
    long_documents: LongDocuments = "cut",
    skipped: SkippedRows | None = None,
) -> Iterator[Sequence]:
    """Tokenize documents in corpus order until every quota is met.

    Args:
        docs: (split, document) pairs, as `splits.assign_splits` gives them.
        quota: Split to the number of tokens wanted from it; the sequence that would exceed it is
            cut, and nothing more of its document is used. Splits that are not named are skipped.
        vocabulary: Rows of the model's embedding.
        long_documents: See above.
        skipped: Counts the chats that the template refuses.

    Raises:
        InputError: A token without a row in the embedding, or no document but refused chats.

    Sequences of fewer than two tokens are dropped: nothing can be predicted from them. Memory: the
    ids of one part of a text, see windows.py.
    """
    skipped = SkippedRows("the corpus") if skipped is None else skipped
    left, refused, any_read = dict(quota), 0, False
    for name, doc in docs:
        if left.get(_with_room(name, left), 0) < 1:
            if not any(left.values()):
                break
            continue
        try:
            for sequence in _sequences(doc, tokenizer, seq_len, long_documents, name):
                split = _with_room(name, left)
                if left[split] < 1:
                    break
                ids = sequence.ids[: left[split]]
                if len(ids) < 2 <= left[split]:
                    continue
                check_ids(ids, tokenizer, vocabulary)
                left[split] -= len(ids)
                any_read = True
                yield replace(sequence, split=split, ids=ids)
        except UnusableRowError as error:
            skipped.add(doc.where, error)
            refused += 1
            if refused == GIVE_UP and not any_read:
                break
    if refused and not any_read:
        raise skipped.error()


def _with_room(split: str, left: Mapping[str, int]) -> str:
    """Return the split that takes a document's next sequence."""
    return COUNTED if split == SPLITS[0] and left.get(split, 0) < 1 and COUNTED in left else split


def _sequences(
    doc: Document, tokenizer: Tokenizer, seq_len: int, long_documents: LongDocuments, split: str
) -> Iterator[Sequence]:
    """Yield a document's only sequence, or the windows of a text.

    Raises:
        UnusableRowError: See `encode_document`; before the first sequence.
    """
    if doc.chat is not None or long_documents == "cut":
        whole = encode_document(tokenizer, doc, seq_len + 1)
        yield Sequence(split, whole[:seq_len], len(whole) > seq_len)
        return
    parts = ids_by_parts(partial(_ids_of, tokenizer), doc.text)
    bos = with_bos(tokenizer, [])
    for number, (ids, more) in enumerate(windows(parts, bos, seq_len)):
        yield Sequence(split, ids, more, first=number == 0)


def check_ids(ids: list[int], tokenizer: Tokenizer, vocabulary: float) -> None:
    """Raise `InputError` if a token has no row in an embedding of `vocabulary` rows."""
    if (largest := max(ids)) >= vocabulary:
        raise InputError(
            f"{tokenizer.name_or_path}: the tokenizer gives id {largest} "
            f"({tokenizer.convert_ids_to_tokens(largest)!r}), but the model has embeddings for "
            f"{vocabulary} ids alone; give the tokenizer that belongs to the model"
        )


def token_batches(
    docs: Iterable[tuple[str, Document]],
    tokenizer: Tokenizer,
    quota: Mapping[str, int],
    *,
    seq_len: int,
    batch_size: int,
    vocabulary: float = float("inf"),
    long_documents: LongDocuments = "cut",
    skipped: SkippedRows | None = None,
) -> Iterator[TokenBatch]:
    """Batch the sequences of each split; see `tokenize_documents` and `batch_by_length`."""
    rows = tokenize_documents(docs, tokenizer, quota, seq_len, vocabulary, long_documents, skipped)
    return batch_by_length(rows, seq_len=seq_len, batch_size=batch_size)


def batch_by_length(
    rows: Iterable[Sequence], *, seq_len: int, batch_size: int
) -> Iterator[TokenBatch]:
    """Batch sequences of similar length, at most `batch_size * seq_len` places per batch.

    Within a window of `WINDOW` full batches of one split, the longest come first. The batches
    depend on the rows alone. Memory: the ids of one window per split.
    """
    places = batch_size * seq_len
    waiting: dict[str, list[list[int]]] = {}
    held: dict[str, int] = {}
    for row in rows:
        waiting.setdefault(row.split, []).append(row.ids)
        held[row.split] = held.get(row.split, 0) + len(row.ids)
        if held[row.split] >= WINDOW * places:
            yield from _cut(row.split, waiting.pop(row.split), places)
            held[row.split] = 0
    for split, ids in waiting.items():
        yield from _cut(split, ids, places)


def _cut(split: str, rows: list[list[int]], places: int) -> Iterator[TokenBatch]:
    rows.sort(key=len, reverse=True)
    start = 0
    while start < len(rows):
        stop = start + max(1, places // len(rows[start]))
        yield _pad(split, rows[start:stop])
        start = stop


def _pad(split: str, rows: list[list[int]]) -> TokenBatch:
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    keep = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        keep[i, : len(row)] = True
    return TokenBatch(split, ids, keep)
