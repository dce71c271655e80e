"""Pack a corpus into one matrix of training sequences, and draw batches from it.

Shape letters: N sequences, S sequence.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from sparsecast.core.errors import InputError
from sparsecast.core.progress import progress_bar
from sparsecast.core.text.corpus import Document
from sparsecast.core.text.rows import UnusableRowError
from sparsecast.core.text.skipped import SkippedRows
from sparsecast.core.text.tokens import encode, encode_document, with_bos

GROUP = 1024
"""Documents per call of the tokenizer."""


def pack_documents(
    docs: Iterable[Document],
    tokenizer: Any,
    seq_len: int,
    limit: int,
    vocabulary: float = float("inf"),
    skipped: SkippedRows | None = None,
) -> Tensor:
    """Concatenate tokenized documents and cut them into sequences of `seq_len` tokens.

    The first token of every sequence is replaced by BOS if the tokenizer has one. Chats go through
    the tokenizer's template.

    Args:
        limit: Stop reading after this many tokens.
        vocabulary: Number of rows of the model's embedding.
        skipped: Counts the chats that the template refuses.

    Returns:
        (N, S) int32 on the CPU. Peak memory is 4 bytes per token plus one group of documents.

    Raises:
        InputError: Too little text, no document but refused chats, or a token without a row in the
            embedding.
    """
    skipped = SkippedRows("the corpus") if skipped is None else skipped
    flat: list[Tensor] = []
    total = 0
    stream = iter(docs)
    with progress_bar("tokenize", None) as progress:
        while total < limit and (group := list(islice(stream, GROUP))):
            for ids in _encoded(tokenizer, group, skipped):
                flat.append(torch.tensor(ids, dtype=torch.int32))
                total += len(ids)
            progress.advance(len(group))
    if not total and skipped.count:
        raise skipped.error()
    if total < seq_len:
        raise InputError(
            f"the training split has {total} tokens, expected at least {seq_len}; give more text "
            "or a smaller --seq-len"
        )
    rows = torch.cat(flat)[: total - total % seq_len].view(-1, seq_len).clone()
    if (largest := int(rows.max())) >= vocabulary:
        raise InputError(
            f"{tokenizer.name_or_path}: the tokenizer gives id {largest} "
            f"({tokenizer.convert_ids_to_tokens(largest)!r}), but the model has embeddings for "
            f"{vocabulary} ids alone; give the tokenizer that belongs to the model"
        )
    if tokenizer.bos_token_id is not None:
        rows[:, 0] = tokenizer.bos_token_id
    return rows


def _encoded(
    tokenizer: Any, group: Sequence[Document], skipped: SkippedRows
) -> Iterator[list[int]]:
    """Encode documents without a length limit; plain texts are encoded on every core."""
    plain = iter(_plain(tokenizer, [doc.text for doc in group if doc.chat is None]))
    for doc in group:
        if doc.chat is None:
            yield with_bos(tokenizer, next(plain))
            continue
        try:
            yield encode_document(tokenizer, doc, sys.maxsize)
        except UnusableRowError as error:
            skipped.add(doc.where, error)


def _plain(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return [encode(tokenizer, text, sys.maxsize) for text in texts]
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True  # a literal <s> in the text is text
    backend.no_truncation()  # tokenizer.json may ask for it
    backend.no_padding()
    return [got.ids for got in backend.encode_batch_fast(texts, add_special_tokens=False)]


class Batches(torch.utils.data.IterableDataset[Tensor]):
    """Endless (B, S) int64 batches, starting at step `first`.

    Each epoch is a seeded permutation, so the batch of a step depends only on the seed and the
    step, and a resumed run sees the batches of an uninterrupted one.
    """

    def __init__(self, rows_NS: Tensor, batch_size: int, seed: int, first: int = 0) -> None:
        self._rows_NS = rows_NS
        self._batch_size = batch_size
        self._seed = seed
        self.first = first

    def __iter__(self) -> Iterator[Tensor]:
        n_rows = len(self._rows_NS)
        place = self.first * self._batch_size
        while True:
            take: list[Tensor] = []
            need = self._batch_size
            while need:
                epoch, offset = divmod(place, n_rows)
                chosen = self._order(epoch)[offset : offset + need]
                take.append(chosen)
                need -= len(chosen)
                place += len(chosen)
            index = torch.cat(take).to(self._rows_NS.device)
            yield self._rows_NS[index].long()

    def _order(self, epoch: int) -> Tensor:
        if getattr(self, "_epoch", None) != epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            self._permutation = torch.randperm(len(self._rows_NS), generator=generator)
            self._epoch = epoch
        return self._permutation
