"""Batches of an activation store's split, with all layers of a process at once.

Tokens are shuffled in blocks of `BLOCK` neighbors. A batch combines blocks from the whole split,
which comes close to a full shuffle but reads a few large slices instead of single rows.

Memory: four batches; the store stays on disk.

Shape letters: L layers, B batch, T tokens, D hidden, F FFN width, P packed width.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from sparsecast.collect.store.store import ActivationStore
from sparsecast.core.prefetch import prefetch

BLOCK = 32
READERS = 8
"""Threads that read a batch for a GPU. On the CPU one reads, because the others train."""


class LayersBatch(NamedTuple):
    """The same B tokens in every layer; B rows of every expert."""

    x_LBD: Tensor
    """Raw predictor inputs, f16 or bf16."""
    mask_LBP: Tensor
    """uint8, packed; see core/bitmask.py."""
    rows: tuple[int, ...] | None = None
    """How many of the B rows each expert has, if not all; zeros follow them."""
    value_LBF: Tensor | None = None
    """uint8 codes of what active entries are worth, see collect/store/energy.py; if asked for."""


def allocate(
    rows: Iterable[Tensor], layers: int, tokens: int, *, pinned: bool
) -> tuple[Tensor, Tensor]:
    """Return empty inputs and masks of a batch, of the dtypes and widths of `rows`."""
    x_LBD, mask_LBP = (
        torch.empty(layers, tokens, part.shape[1], dtype=part.dtype, pin_memory=pinned)
        for part in rows
    )
    return x_LBD, mask_LBP


class TokenBlocks(torch.utils.data.IterableDataset[LayersBatch]):
    """Batches of one split, shuffled by (seed, `epoch`); in order without a seed.

    Args:
        layers: Layers of a batch; every recorded layer unless given.
        for_gpu: Read with several threads into pinned memory, so that copies to a GPU overlap with
            computing.
        share: (i, n) keeps the i-th of every n batches. The batches after the last n are dropped,
            so that all shares have the same length.
        values: Read the energies too; the store must have them.
    """

    def __init__(
        self,
        store: ActivationStore,
        split: str,
        batch_size: int,
        seed: int | None = None,
        *,
        layers: Sequence[int] | None = None,
        for_gpu: bool = False,
        share: tuple[int, int] = (0, 1),
        values: bool = False,
    ) -> None:
        self._store = store
        self._split = split
        self._seed = seed
        self._layers = list(store.manifest.layers if layers is None else layers)
        self._pinned = for_gpu
        self._share = share
        self._values = values
        self._per_batch = batch_size // BLOCK
        self._blocks = [
            (shard, start, min(start + BLOCK, tokens))
            for shard, tokens in enumerate(store.shards(split))
            for start in range(0, tokens, BLOCK)
        ]
        self.epoch = 0

    def __len__(self) -> int:
        batches = -(-len(self._blocks) // self._per_batch)
        return batches if self._share[1] == 1 else batches // self._share[1]

    def __iter__(self) -> Iterator[LayersBatch]:
        workers = min(READERS, os.cpu_count() or 1) if self._pinned else 1
        with ThreadPoolExecutor(workers, "read") as pool:
            # Read the next batch while this one trains.
            yield from prefetch(self._read(blocks, pool) for blocks in self._batches())

    def _batches(self) -> Iterator[list[tuple[int, int, int]]]:
        """The blocks of each batch: (shard, first row, last row + 1)."""
        order = list(range(len(self._blocks)))
        if self._seed is not None:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self.epoch)
            order = torch.randperm(len(order), generator=generator).tolist()
        place, of = self._share
        firsts = range(0, len(order), self._per_batch)
        for first in firsts[place::of][: len(self)]:
            yield [self._blocks[i] for i in order[first : first + self._per_batch]]

    def _read(self, blocks: list[tuple[int, int, int]], pool: ThreadPoolExecutor) -> LayersBatch:
        tokens = sum(stop - start for _, start, stop in blocks)
        one = self._store.rows(self._split, 0, self._layers[0], 0, 1)
        x_LBD, mask_LBP = allocate(one, len(self._layers), tokens, pinned=self._pinned)
        value_LBF = None
        if self._values:
            size = (len(self._layers), tokens, self._store.manifest.ffn_width)
            value_LBF = torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)

        def read(place: int) -> None:
            layer = self._layers[place]
            rows = [self._store.rows(self._split, shard, layer, *run) for shard, *run in blocks]
            torch.cat([part.x_TD for part in rows], out=x_LBD[place])
            torch.cat([part.mask_TP for part in rows], out=mask_LBP[place])
            if value_LBF is not None:
                codes = [
                    self._store.codes(self._split, shard, layer, *run) for shard, *run in blocks
                ]
                torch.cat(codes, out=value_LBF[place])

        for _ in pool.map(read, range(len(self._layers))):
            pass
        return LayersBatch(x_LBD, mask_LBP, value_LBF=value_LBF)
