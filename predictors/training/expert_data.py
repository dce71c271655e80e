"""Batches of a layer's experts, each from the rows that were routed to it.

Experts see different numbers of tokens, but are trained side by side. An expert's rows form an
endless stream of passes, each in an order of its own, shuffled in blocks of `BLOCK` neighbors; an
epoch takes the next part of every stream, as long as the experts' mean number of rows. So a busy
expert sees another part of its rows in each epoch, and a rare one its few rows several times.

Memory: four batches; the number of every routed row (4 bytes), and an order of them (8 bytes).

Shape letters: L experts of a batch, B rows of a batch, T tokens, D hidden, P packed width.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from sparsecast.collect.store.store import ActivationStore, Rows
from sparsecast.core.prefetch import prefetch
from sparsecast.predictors.training.data import BLOCK, READERS, LayersBatch, allocate

LEAST_ROWS = {"train": 128, "calibration": 16}
"""An expert with fewer is not trained: its predictor selects every neuron."""


def trained_ffns(store: ActivationStore) -> list[int]:
    """Return the FFNs with enough rows to train and calibrate a predictor; all of a dense model."""
    if not store.manifest.experts:
        return store.manifest.ffns
    stats = store.stats()
    return [
        ffn
        for ffn in store.manifest.ffns
        if all(stats.token_sparsity(ffn, [s]).tokens >= least for s, least in LEAST_ROWS.items())
    ]


class ExpertBatches(torch.utils.data.IterableDataset[LayersBatch]):
    """Batches of one split: with a seed endless streams cut into epochs, without one every row once
    and in order, the batches' ends padded where an expert has no more rows.

    Args:
        ffns: FFNs of a batch, of which each has rows.
        for_gpu: See `TokenBlocks`.
    """

    def __init__(
        self,
        store: ActivationStore,
        split: str,
        batch_size: int,
        seed: int | None = None,
        *,
        ffns: Sequence[int],
        for_gpu: bool = False,
    ) -> None:
        self._store = store
        self._split = split
        self._seed = seed
        self._ffns = list(ffns)
        self._size = batch_size
        self._pinned = for_gpu
        shards = range(len(store.shards(split)))
        self._tokens = {
            ffn: [store.routed(split, shard, ffn).int() for shard in shards] for ffn in self._ffns
        }
        self._rows = {ffn: sum(map(len, parts)) for ffn, parts in self._tokens.items()}
        self._passes: dict[int, tuple[int, Tensor]] = {}
        self.epoch = 0

    def __len__(self) -> int:
        if self._seed is None:
            return -(-max(self._rows.values()) // self._size)
        return -(-sum(self._rows.values()) // (self._size * len(self._ffns)))

    def __iter__(self) -> Iterator[LayersBatch]:
        first = 0 if self._seed is None else self.epoch * len(self)
        workers = min(READERS, os.cpu_count() or 1) if self._pinned else 1
        with ThreadPoolExecutor(workers, "read") as pool:
            numbers = range(first, first + len(self))
            yield from prefetch(self._read(number * self._size, pool) for number in numbers)

    def _read(self, start: int, pool: ThreadPoolExecutor) -> LayersBatch:
        one = self._store.rows(self._split, *self._first_row(), 0, 1)
        x_LBD, mask_LBP = allocate(one, len(self._ffns), self._size, pinned=self._pinned)
        x_LBD.zero_()
        mask_LBP.zero_()

        def read(place: int) -> int:
            ffn = self._ffns[place]
            chosen_B = self._chosen(ffn, start)
            for where_B, rows in self._rows_of(ffn, chosen_B):
                x_LBD[place, where_B] = rows.x_TD
                mask_LBP[place, where_B] = rows.mask_TP
            return len(chosen_B)

        counts = tuple(pool.map(read, range(len(self._ffns))))
        return LayersBatch(x_LBD, mask_LBP, counts)

    def _first_row(self) -> tuple[int, int]:
        """(shard, FFN) of a row that exists."""
        ffn = self._ffns[0]
        return next(i for i, part in enumerate(self._tokens[ffn]) if len(part)), ffn

    def _chosen(self, ffn: int, start: int) -> Tensor:
        """Numbers of the rows from place `start` on, at most a batch of them."""
        total = self._rows[ffn]
        if self._seed is None:
            return torch.arange(min(start, total), min(start + self._size, total))
        parts, left = [], self._size
        while left:
            order, place = self._order(ffn, start // total), start % total
            part = order[place : place + left]
            parts.append(part)
            start, left = start + len(part), left - len(part)
        return torch.cat(parts)

    def _order(self, ffn: int, number: int) -> Tensor:
        """Rows of an FFN in the order of one pass."""
        if (kept := self._passes.get(ffn)) is not None and kept[0] == number:
            return kept[1]
        assert self._seed is not None
        total = self._rows[ffn]
        seed = (self._seed * 1_000_003 + ffn) * 1_000_003 + number
        generator = torch.Generator().manual_seed(seed % 2**63)
        blocks = torch.randperm(-(-total // BLOCK), generator=generator)
        order = (blocks[:, None] * BLOCK + torch.arange(BLOCK)).flatten()
        order = order[order < total]
        self._passes[ffn] = number, order
        return order

    def _rows_of(self, ffn: int, chosen_B: Tensor) -> Iterator[tuple[Tensor, Rows]]:
        """Places in a batch, and the rows that belong there, one shard at a time."""
        first = 0
        for shard, token_T in enumerate(self._tokens[ffn]):
            inside = (chosen_B >= first) & (chosen_B < first + len(token_T))
            where_B = inside.nonzero()[:, 0]
            if len(where_B):
                token = token_T[chosen_B[where_B] - first].long()
                yield where_B, self._store.expert_rows(self._split, shard, ffn, token)
            first += len(token_T)
