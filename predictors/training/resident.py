"""Batches from a split that lies whole on the GPU that trains.

Where layers are small, reading a batch takes longer than training on it: its blocks are slices of
hundreds of tensors, and the threads that cut them hold the lock that launching kernels needs. So a
small split is read once, and batches are gathered on the GPU.

Shape letters: L layers, B batch, T tokens of the split, D hidden, F FFN width, P packed width.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

import torch

from sparsecast.collect.store.store import ActivationStore
from sparsecast.predictors.training.data import READERS, LayersBatch, TokenBlocks

MOST_BYTES = 16 << 30
"""Largest split that is kept on a GPU, in all layers of a process."""
MOST_SHARE = 1 / 8
"""The same, relative to the GPU memory that is free."""


class ResidentBlocks(TokenBlocks):
    """The batches of `TokenBlocks`, on `device`.

    Memory: on `device` the rows of the split in all `layers` from the first batch until `close`,
    and three batches.
    """

    def __init__(
        self,
        store: ActivationStore,
        split: str,
        batch_size: int,
        seed: int | None = None,
        *,
        layers: Sequence[int] | None = None,
        share: tuple[int, int] = (0, 1),
        values: bool = False,
        device: torch.device,
    ) -> None:
        super().__init__(store, split, batch_size, seed, layers=layers, share=share, values=values)
        self._device = device
        self._whole: LayersBatch | None = None

    def close(self) -> None:
        """Release the memory of the split."""
        self._whole = None

    def __iter__(self) -> Iterator[LayersBatch]:
        if self._whole is None:
            self._whole = self._read_whole()
        x_LTD, mask_LTP, _, value_LTF = self._whole
        first_of = list(accumulate(self._store.shards(self._split), initial=0))
        for blocks in self._batches():
            token_B = torch.cat(
                [
                    torch.arange(first_of[shard] + start, first_of[shard] + stop)
                    for shard, start, stop in blocks
                ]
            ).to(self._device, non_blocking=True)
            yield LayersBatch(
                x_LTD.index_select(1, token_B),
                mask_LTP.index_select(1, token_B),
                value_LBF=None if value_LTF is None else value_LTF.index_select(1, token_B),
            )

    def _read_whole(self) -> LayersBatch:
        shards = self._store.shards(self._split)
        x_LTD, mask_LTP = (
            torch.empty(
                (len(self._layers), sum(shards), part.shape[1]),
                dtype=part.dtype,
                device=self._device,
            )
            for part in self._store.rows(self._split, 0, self._layers[0], 0, 1)
        )
        value_LTF = None
        if self._values:
            size = (len(self._layers), sum(shards), self._store.manifest.ffn_width)
            value_LTF = torch.empty(size, dtype=torch.uint8, device=self._device)

        def read(place: int) -> None:
            first = 0
            for shard, tokens in enumerate(shards):
                rows = self._store.rows(self._split, shard, self._layers[place])
                x_LTD[place, first : first + tokens] = rows.x_TD
                mask_LTP[place, first : first + tokens] = rows.mask_TP
                if value_LTF is not None:
                    codes_TF = self._store.codes(self._split, shard, self._layers[place], 0, None)
                    value_LTF[place, first : first + tokens] = codes_TF
                first += tokens

        with ThreadPoolExecutor(min(READERS, os.cpu_count() or 1), "read") as pool:
            for _ in pool.map(read, range(len(self._layers))):
                pass
        return LayersBatch(x_LTD, mask_LTP, value_LBF=value_LTF)


def fits_on(
    device: torch.device, store: ActivationStore, split: str, layers: int, *, values: bool
) -> bool:
    """Return whether the rows of a split in so many layers may stay on a GPU."""
    if device.type != "cuda":
        return False
    one = store.rows(split, 0, store.manifest.layers[0], 0, 1)
    row_bytes = sum(part.nbytes for part in one) + values * store.manifest.ffn_width
    nbytes = layers * store.manifest.tokens(split) * row_bytes
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return nbytes <= min(MOST_BYTES, MOST_SHARE * free)
