"""Runs of a GPU build with none, half or all of the FFN's neurons on the GPU.

The budgets and the files of neurons come from the exporter's own code, which the engine is to
judge: it must take these files and use the memory that was planned.

Shape letters: L layers, F FFN width.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sparsecast.export.bundle import GPUIDX_SUFFIX
from sparsecast.export.engine.protocol import CHUNK
from sparsecast.export.read.header import header_of
from sparsecast.export.read.reader import GGUFFile
from sparsecast.export.write.gpuidx import write_gpuidx
from sparsecast.export.write.hot_cold import BLOCK, Split, split_for
from sparsecast.export.write.vram import INDEX_BYTES, ON_GPU_FIRST, ROWS, Budget

KV_BYTES = 4
"""Of a float32, with --memory-f32."""


class Offload(NamedTuple):
    """One choice of neurons."""

    name: str
    split: Split
    gib: float
    """The --vram-budget."""

    @property
    def cache(self) -> int:
        """Bytes of the KV cache."""
        return 2 * self.split.budget.half_cache

    @property
    def rows(self) -> int:
        """Bytes of the neurons' rows, without the lists of neurons."""
        return self.split.neurons * (self.split.budget.neuron - INDEX_BYTES)

    @property
    def planned(self) -> int:
        """Bytes of weights and KV cache."""
        return self.split.budget.before + self.cache + self.rows

    @property
    def partial(self) -> bool:
        """Whether a layer is split between GPU and CPU."""
        return any(0 < len(hot_K) < self.split.width for hot_K in self.split.hot)


def refused_width(ffn: int) -> str:
    """Say why an FFN of that width cannot be split; empty where it can."""
    if ffn % BLOCK == 0:
        return ""
    return f"the FFN is {ffn} wide, not a multiple of {BLOCK}, so no neuron can be on the GPU"


def offloads(file: GGUFFile, counts: list[Tensor] | None) -> list[Offload]:
    """Plan the budgets that hold none, half and all of the neurons, in whole blocks of 256.

    Args:
        counts: Per layer (F,): how often each neuron fired. Without them every layer gets the same
            share, of neurons that do not stand together.

    The FFN's width must be a multiple of 256.
    """
    header = header_of(file)
    if counts is None:
        counts = [_scattered(header.ffn)] * header.layers
    blocks = header.layers * (header.ffn // BLOCK)
    chosen = {"none": 0, "half": blocks // 2, "all": blocks}
    return [_offload(name, file, counts, n) for name, n in chosen.items()]


def _offload(name: str, file: GGUFFile, counts: list[Tensor], blocks: int) -> Offload:
    free = _budget(file, 0)
    need = free.before + 2 * free.half_cache + blocks * BLOCK * free.neuron
    gib = torch.tensor(need / 2**30, dtype=torch.float32)
    if gib.item() * 2**30 < need:
        gib = gib.nextafter(torch.tensor(torch.inf))
    budget = _budget(file, int(gib.item() * 2**30))
    return Offload(name, split_for(budget, [count_F.long() for count_F in counts]), gib.item())


def _budget(file: GGUFFile, given: int) -> Budget:
    header, there = header_of(file), file.entries
    rows = [there[name] for kind in ROWS if (name := f"blk.0.{kind}.weight") in there]
    first = [entry for name, entry in there.items() if name.split(".")[-2] in ON_GPU_FIRST]
    return Budget(
        given=given,
        before=sum(entry.nbytes for entry in first),
        half_cache=KV_BYTES * header.layers * CHUNK * header.kv_heads * header.head_dim,
        neuron=sum(entry.nbytes // entry.shape[0] for entry in rows) + INDEX_BYTES,
    )


def _scattered(width: int) -> Tensor:
    """Return (F,) int64 counts of all different values in no order."""
    return torch.randperm(width, generator=torch.Generator().manual_seed(0)) + 1


@contextmanager
def offloaded(file: GGUFFile, offload: Offload) -> Iterator[Path]:
    """Give the path of a model file beside which only this choice of neurons lies."""
    with tempfile.TemporaryDirectory(prefix="sparsecast-engine-") as scratch:
        model = Path(scratch, file.path.name)
        os.symlink(file.path.absolute(), model)
        write_gpuidx(Path(f"{model}{GPUIDX_SUFFIX}"), offload.split)
        yield model
