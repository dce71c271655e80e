"""A corpus as one matrix of training sequences.

Shape letters: N sequences, S sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from sparsecast.collect.errors import InputError
from sparsecast.collect.progress import bar


def sequences(texts: Iterable[str], tokenizer: Any, seq_len: int, limit: int) -> Tensor:
    """(N, S) int32 on the CPU: documents end to end, cut every S tokens, each row led by BOS.

    Args:
        tokenizer: One that is backed by the tokenizers library.
        limit: Stop reading after this many tokens.

    Memory: 4 bytes per token, of at most `limit` tokens.
    """
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True  # a literal <s> in the text is text
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    flat: list[Tensor] = []
    total = 0
    stream = iter(texts)
    with bar("tokenise", None) as progress:
        while total < limit and (group := list(islice(stream, 1024))):
            for encoding in backend.encode_batch_fast(group, add_special_tokens=False):
                flat.append(torch.tensor(bos + encoding.ids, dtype=torch.int32))
                total += len(flat[-1])
            progress.advance(len(group))
    rows = torch.cat(flat)[: total - total % seq_len].view(-1, seq_len).clone()
    if not len(rows):
        raise InputError(
            f"the training split has {total} tokens, expected at least {seq_len}; give more text "
            "or a smaller --seq-len"
        )
    if tokenizer.bos_token_id is not None:
        rows[:, 0] = tokenizer.bos_token_id
    return rows


class Batches(torch.utils.data.IterableDataset[Tensor]):
    """(B, S) batches from step `first` on; every step's batch depends on the seed and step alone.

    Epochs are seeded permutations, so a resumed run sees what an uninterrupted one would.
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
