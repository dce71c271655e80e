"""Runs of a GPU build with none, half or all of the FFN's neurons on the GPU.

The budgets and the files of neurons come from the exporter's own code, which the engine is to
judge: it must take these files and use the memory that was planned.

Shape letters: L layers, F FFN width.
"""

from __future__ import annotations

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
from sparsecast.export.write.vram import INDEX_BYTES, Budget, budget_for, gib_for

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
    def budget(gib: float) -> Budget:
        return budget_for(gib, CHUNK, file.entries, header_of(file), kv_bytes=KV_BYTES)

    free = budget(0.0)
    gib = gib_for(free.before + 2 * free.half_cache + blocks * BLOCK * free.neuron)
    split = split_for(budget(gib), [count_F.long() for count_F in counts])
    return Offload(name, split, gib)


def _scattered(width: int) -> Tensor:
    """Return (F,) int64 counts of all different values in no order."""
    return torch.randperm(width, generator=torch.Generator().manual_seed(0)) + 1


@contextmanager
def offloaded(file: GGUFFile, offload: Offload) -> Iterator[Path]:
    """Give the path of a model file beside which only this choice of neurons lies."""
    with tempfile.TemporaryDirectory(prefix="sparsecast-engine-") as scratch:
        yield link_with_split(file.path, offload.split, Path(scratch))


def link_with_split(model: Path, split: Split, folder: Path) -> Path:
    """Put a link to the model into a folder, and the split beside it; return the link."""
    link = folder / model.name
    link.symlink_to(model.absolute())
    write_gpuidx(Path(f"{link}{GPUIDX_SUFFIX}"), split)
    return link
