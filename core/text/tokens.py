"""Tokenize documents into padded batches.

Every document starts with exactly one BOS where the tokenizer has one (its absence is the classic
cause of abnormal activations in these models). A document longer than the sequence length is
truncated, never packed with another: what is recorded at a position is what the model computes
there when it reads that document alone.

Shape letters: B batch, S sequence.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from sparsecast.core.errors import InputError, reason_of
from sparsecast.core.text.corpus import Document
from sparsecast.core.text.splits import SPLITS

COUNTED = "counted"
"""Takes training documents once the training split is full; its tokens are only counted."""
WINDOW = 16
"""Batches whose sequences are sorted by length together."""


@dataclass(frozen=True, slots=True)
class Sequence:
    """One document's token ids."""

    split: str
    ids: list[int]
    truncated: bool


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
    plain = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
    return with_bos(tokenizer, plain["input_ids"])[:seq_len]


def encode_document(tokenizer: Tokenizer, doc: Document, seq_len: int) -> list[int]:
    """Encode a document; a chat goes through the tokenizer's template, with one BOS.

    Special tokens are those that the template writes; one that somebody spells out is text.

    Raises:
        InputError: A chat and no template, or one that the template refuses.
    """
    if doc.chat is None:
        return encode(tokenizer, doc.text, seq_len)
    if not tokenizer.chat_template:
        raise InputError(
            f"{tokenizer.name_or_path}: the corpus holds chats but this tokenizer has no chat "
            "template; give plain text under 'text', or add the model's chat_template.jinja"
        )
    # A special token that somebody spells out passes the template as a stand-in.
    spelled = [said for said in _specials(tokenizer) if said in doc.text]
    stand_ins = {f"\ue000{place}\ue001": said for place, said in enumerate(spelled)}
    turns = []
    for role, content in doc.chat:
        for stand_in, said in stand_ins.items():
            content = content.replace(said, stand_in)
        turns.append({"role": role, "content": content})
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception as error:  # a template raises what it likes
        raise InputError(
            f"{tokenizer.name_or_path}: its chat template refuses the chat that begins "
            f"{doc.text[:40]!r} ({reason_of(error)}); drop such rows or change their roles"
        ) from error
    parts = re.split(f"({'|'.join(stand_ins)})", text) if stand_ins else [text]
    ids: list[int] = []
    for part in parts:
        literal = part in stand_ins
        ids += tokenizer(
            stand_ins.get(part, part),
            add_special_tokens=False,
            split_special_tokens=literal,
            verbose=False,
        )["input_ids"]
    return with_bos(tokenizer, ids)[:seq_len]


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
) -> Iterator[Sequence]:
    """Tokenize documents in corpus order until every quota is met.

    Args:
        docs: (split, document) pairs, as `splits.assign_splits` gives them.
        quota: Split to the number of tokens wanted from it; the document that would exceed it is
            cut. Splits that are not named are skipped.
        vocabulary: Rows of the model's embedding.

    Raises:
        InputError: A token without a row in the embedding.

    Documents that give fewer than two tokens are dropped: nothing can be predicted from them.
    """
    left = dict(quota)
    for name, doc in docs:
        split = COUNTED if name == SPLITS[0] and left.get(name, 0) < 1 else name
        if left.get(split, 0) < 1:
            if not any(left.values()):
                break
            continue
        whole = encode_document(tokenizer, doc, seq_len + 1)
        ids = whole[: min(seq_len, left[split])]
        if len(ids) < 2 <= left[split]:
            continue
        if (largest := max(ids)) >= vocabulary:
            raise InputError(
                f"{tokenizer.name_or_path}: the tokenizer gives id {largest} "
                f"({tokenizer.convert_ids_to_tokens(largest)!r}), but the model has embeddings for "
                f"{vocabulary} ids alone; give the tokenizer that belongs to the model"
            )
        left[split] -= len(ids)
        yield Sequence(split, ids, len(whole) > seq_len)


def token_batches(
    docs: Iterable[tuple[str, Document]],
    tokenizer: Tokenizer,
    quota: Mapping[str, int],
    *,
    seq_len: int,
    batch_size: int,
    vocabulary: float = float("inf"),
) -> Iterator[TokenBatch]:
    """Batch the sequences of each split; see `tokenize_documents` and `batch_by_length`."""
    rows = tokenize_documents(docs, tokenizer, quota, seq_len, vocabulary)
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
