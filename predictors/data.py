"""Training batches from the memory maps of an activation store, all layers at once.

Tokens are shuffled in blocks of `BLOCK` neighbours, and a batch is made of blocks from all over
the split: near enough to a full shuffle, at the reading pattern of a few large slices.

Memory: one batch; the store stays on disk.

Shape letters: L layers, B batch, T tokens, D hidden, F FFN width, P packed width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sparsecast.collect.bits import unpack
from sparsecast.collect.prefetch import prefetch
from sparsecast.collect.store import ActivationStore

BLOCK = 32


class LayersBatch(NamedTuple):
    """The same B tokens as every layer saw them."""

    x_LBD: Tensor
    """Raw predictor inputs, f16 or bf16."""
    mask_LBP: Tensor
    """uint8, packed; see collect.bits."""


class TokenBlocks(torch.utils.data.IterableDataset[LayersBatch]):
    """Batches of one split; shuffled anew by (seed, `epoch`), or in order."""

    def __init__(
        self, store: ActivationStore, split: str, batch_size: int, seed: int | None = None
    ) -> None:
        self._store = store
        self._split = split
        self._seed = seed
        self._per_batch = batch_size // BLOCK
        self._blocks = [
            (shard, start, min(start + BLOCK, tokens))
            for shard, tokens in enumerate(store.shards(split))
            for start in range(0, tokens, BLOCK)
        ]
        self.epoch = 0

    def __len__(self) -> int:
        return -(-len(self._blocks) // self._per_batch)

    def __iter__(self) -> Iterator[LayersBatch]:
        order = list(range(len(self._blocks)))
        if self._seed is not None:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self.epoch)
            order = torch.randperm(len(order), generator=generator).tolist()
        chosen = (
            [self._blocks[i] for i in order[first : first + self._per_batch]]
            for first in range(0, len(order), self._per_batch)
        )
        # The next batch is read while this one trains.
        yield from prefetch(map(self._read, chosen))

    def _read(self, blocks: list[tuple[int, int, int]]) -> LayersBatch:
        store, split = self._store, self._split
        layers = [
            [store.rows(split, shard, layer, start, stop) for shard, start, stop in blocks]
            for layer in store.manifest.layers
        ]
        return LayersBatch(
            torch.stack([torch.cat([rows.x_TD for rows in layer]) for layer in layers]),
            torch.stack([torch.cat([rows.mask_TP for rows in layer]) for layer in layers]),
        )


def layer_batches(
    store: ActivationStore,
    split: str,
    layer: int,
    size: int = 1024,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[Tensor, Tensor]]:
    """(x (T, D), active (T, F)) of one layer, at most `size` tokens at a time, on `device`."""
    for shard, start, stop in _runs(store, split, size):
        rows = store.rows(split, shard, layer, start, stop)
        yield rows.x_TD.to(device), unpack(rows.mask_TP.to(device), store.manifest.ffn_width)


def layer_energies(
    store: ActivationStore, split: str, layer: int, size: int = 1024
) -> Iterator[Tensor | None]:
    """Energies (T, F) float32 beside `layer_batches`; None where the store has none."""
    for shard, start, stop in _runs(store, split, size):
        yield store.energies(split, shard, layer, start, stop)


def _runs(store: ActivationStore, split: str, size: int) -> Iterator[tuple[int, int, int]]:
    """(shard, first token, token behind the last)."""
    for shard, tokens in enumerate(store.shards(split)):
        for start in range(0, tokens, size):
            yield shard, start, min(start + size, tokens)
