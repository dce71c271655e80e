"""Recorded inputs, masks and energies of one layer, a batch of tokens at a time.

Shape letters: T tokens, D hidden, F FFN width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sparsecast.collect.store.store import ActivationStore
from sparsecast.core.bitmask import unpack

SIZE, GPU_SIZE = 1024, 8192
"""Tokens that are read at once for a CPU, and for a GPU, which waits for the next ones."""


def layer_batches(
    store: ActivationStore,
    split: str,
    layer: int,
    size: int | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs x (T, D) and masks (T, F) bool of one layer, at most `size` tokens at a time.

    Args:
        layer: The number of an FFN, see core/models/ffns.py.
        size: Unset: `SIZE`, or `GPU_SIZE` for a GPU.
    """
    if size is None:
        size = GPU_SIZE if torch.device(device).type == "cuda" else SIZE
    for shard, start, stop in _runs(store, split, layer, size):
        rows = store.rows(split, shard, layer, start, stop)
        yield rows.x_TD.to(device), unpack(rows.mask_TP.to(device), store.manifest.ffn_width)


def layer_energies(
    store: ActivationStore, split: str, layer: int, size: int = SIZE
) -> Iterator[Tensor | None]:
    """Energies (T, F) float32 for the batches of `layer_batches`; None if the store has none."""
    for shard, start, stop in _runs(store, split, layer, size):
        yield store.energies(split, shard, layer, start, stop)


def layer_positions(
    store: ActivationStore, split: str, layer: int, size: int = SIZE
) -> Iterator[Tensor]:
    """Place in its document of each token (T,), for the batches of `layer_batches`."""
    for shard, start, stop in _runs(store, split, layer, size):
        yield store.positions(split, shard, layer)[start:stop]


def _runs(
    store: ActivationStore, split: str, layer: int, size: int
) -> Iterator[tuple[int, int, int]]:
    """Yield (shard, first row, last row + 1)."""
    for shard, tokens in enumerate(store.row_counts(split, layer)):
        for start in range(0, tokens, size):
            yield shard, start, min(start + size, tokens)
