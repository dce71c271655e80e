"""Pack a corpus into training sequences on disk, and draw batches from them.

The file holds the ids of all sequences, one behind the other, as uint16, or as uint32 for more than
65,536 ids; the dtype is the file's suffix. It is mapped into memory, so the operating system
reads the pages that a batch needs, and keeps as many as there is room for.

Shape letters: N sequences, S sequence, B batch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from sparsecast.core.errors import InputError
from sparsecast.core.files import check_file, hidden_sibling
from sparsecast.core.progress import progress_bar
from sparsecast.core.text.corpus import Document
from sparsecast.core.text.rows import UnusableRowError
from sparsecast.core.text.skipped import SkippedRows
from sparsecast.core.text.tokens import encode, encode_document, with_bos

GROUP = 1024
"""Documents per call of the tokenizer."""


def rows_file(folder: Path, vocabulary: int) -> Path:
    """Return the path of the training sequences of a model with this many ids."""
    return folder / f"tokens.{'uint16' if vocabulary <= 1 << 16 else 'uint32'}"


def open_rows(path: Path, seq_len: int) -> np.ndarray[Any, Any]:
    """Map a file of `pack_documents` into memory as (N, S), read-only.

    Raises:
        InputError: It does not hold whole sequences.
    """
    check_file(path, "the tokens of an unfinished run")
    nbytes, row = path.stat().st_size, seq_len * np.dtype(path.suffix[1:]).itemsize
    if not nbytes or nbytes % row:
        raise InputError(
            f"{path}: has {nbytes:,} bytes, expected sequences of {row:,} bytes each; it is "
            f"damaged: remove {path.parent}, and the run begins again"
        )
    return np.memmap(path, dtype=path.suffix[1:], mode="r").reshape(-1, seq_len)


def pack_documents(
    docs: Iterable[Document],
    tokenizer: Any,
    path: Path,
    seq_len: int,
    limit: int,
    vocabulary: int,
    skipped: SkippedRows | None = None,
) -> None:
    """Concatenate tokenized documents, cut into sequences of `seq_len` tokens, in a file.

    The first token of every sequence is replaced by BOS if the tokenizer has one. Chats go through
    the tokenizer's template. Peak memory is one group of documents. The file appears when it is
    complete.

    Args:
        path: As `rows_file` names it.
        limit: Stop reading after this many tokens.
        vocabulary: Number of rows of the model's embedding.
        skipped: Counts the chats that the template refuses.

    Raises:
        InputError: Too little text, no document but refused chats, or a token without a row in the
            embedding.
    """
    skipped = SkippedRows("the corpus") if skipped is None else skipped
    total = 0
    stream = iter(docs)
    part = hidden_sibling(path, "part")
    try:
        with progress_bar("tokenize", None) as progress, part.open("wb") as file:
            while total < limit and (group := list(islice(stream, GROUP))):
                ids_T = _concatenated(tokenizer, group, skipped)
                _check_ids(ids_T, tokenizer, vocabulary)
                if tokenizer.bos_token_id is not None:
                    ids_T[-total % seq_len :: seq_len] = tokenizer.bos_token_id
                file.write(ids_T.astype(path.suffix[1:]).tobytes())
                total += len(ids_T)
                progress.advance(len(group))
            file.truncate(file.tell() - total % seq_len * np.dtype(path.suffix[1:]).itemsize)
        if not total and skipped.count:
            raise skipped.error()
        if total < seq_len:
            raise InputError(
                f"the training split has {total} tokens, expected at least {seq_len}; give more "
                "text or a smaller --seq-len"
            )
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _concatenated(
    tokenizer: Any, group: Sequence[Document], skipped: SkippedRows
) -> np.ndarray[Any, Any]:
    """Return the tokens of a group of documents, one behind the other, as int64."""
    encoded = [np.array(ids, dtype=np.int64) for ids in _encoded(tokenizer, group, skipped)]
    return np.concatenate([np.empty(0, dtype=np.int64), *encoded])


def _check_ids(ids_T: np.ndarray[Any, Any], tokenizer: Any, vocabulary: int) -> None:
    if (largest := int(ids_T.max(initial=0))) >= vocabulary:
        raise InputError(
            f"{tokenizer.name_or_path}: the tokenizer gives id {largest} "
            f"({tokenizer.convert_ids_to_tokens(largest)!r}), but the model has embeddings for "
            f"{vocabulary} ids alone; give the tokenizer that belongs to the model"
        )


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


class Batches(torch.utils.data.IterableDataset[Any]):
    """Endless (B, S) int64 batches on the CPU, starting at step `first`.

    Args:
        path: A file of `pack_documents`.
        batch_size: Sequences per step, over all processes.
    """

    def __init__(
        self, path: Path, seq_len: int, batch_size: int, seed: int, first: int = 0
    ) -> None:
        self._path = path
        self._seq_len = seq_len
        self._choice = batch_size, seed, first
        self._part = 0, 1

    def take_part(self, rank: int, size: int) -> None:
        """Yield the sequences of one of `size` processes, a divisor of the batch size."""
        self._part = rank, size

    def __iter__(self) -> Iterator[Tensor]:
        rows_NS = open_rows(self._path, self._seq_len)
        for index_B in places(len(rows_NS), *self._choice, *self._part):
            yield torch.from_numpy(rows_NS[index_B.numpy()].astype(np.int64))


def places(
    n_rows: int, batch_size: int, seed: int, first: int, rank: int, size: int
) -> Iterator[Tensor]:
    """Yield the (B,) rows of each step from `first` on, without end.

    Each epoch is a seeded permutation, so the batch of a step depends only on the seed and the
    step, and a resumed run sees the batches of an uninterrupted one. Each of `size` processes gets
    its part of the batch.
    """
    assert batch_size % size == 0
    place, drawn = first * batch_size, -1
    while True:
        take: list[Tensor] = []
        need = batch_size
        while need:
            epoch, offset = divmod(place, n_rows)
            if epoch != drawn:
                generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
                order, drawn = torch.randperm(n_rows, generator=generator), epoch
            take.append(order[offset : offset + need])
            need -= len(take[-1])
            place += len(take[-1])
        yield torch.cat(take).chunk(size)[rank]
