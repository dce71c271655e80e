"""What `sparsecast bench collect` times: bare forward, recording, the public recipe, the disk."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsecast.collect.store.filler import Filler, x1_gains
from sparsecast.collect.store.shard import SHARD_BYTES, Shape
from sparsecast.collect.store.units import Unit
from sparsecast.collect.store.writer import Writer, record_unit
from sparsecast.core.models.recorder import Recorder
from sparsecast.core.text.tokens import TokenBatch

RECIPE_BYTES = 2 * 2**30
"""The recipe runs on as many batches as give about this many bytes, at least one."""
MIN_WRITE_BYTES = 2**30


def bare(model: PreTrainedModel, units: list[Unit]) -> None:
    """Every batch through the decoder."""
    for unit in units:
        for batch in unit.batches:
            _forward(model, batch)


def _forward(model: PreTrainedModel, batch: TokenBatch) -> None:
    model.base_model(batch.to(model.device).ids_BS, use_cache=False)


def recording(model: PreTrainedModel, shape: Shape, units: list[Unit], writer: Writer) -> None:
    """Record every unit, as `collect` does; returns when all of them are written."""
    submitting(model, shape, units, writer)
    writer.drain()


def submitting(model: PreTrainedModel, shape: Shape, units: list[Unit], writer: Writer) -> None:
    """Record every unit; the last ones may still be on their way through the writer."""
    filler = Filler(shape, x1_gains(model, shape))
    with Recorder(model, filler):
        for unit in units:
            record_unit(filler, writer, unit, partial(_forward, model))


def recipe_share(shape: Shape, units: list[Unit]) -> tuple[list[Unit], int]:
    """The first batches that give about `RECIPE_BYTES`, and their tokens."""
    per_token = 2 * (shape.hidden_size + shape.ffn_width) * len(shape.layers)
    chosen: list[Unit] = []
    tokens = 0
    for unit in units:
        for batch in unit.batches:
            if tokens and (tokens + batch.tokens) * per_token > RECIPE_BYTES:
                return chosen, tokens
            chosen.append(Unit(unit.split, len(chosen), [batch]))
            tokens += batch.tokens
    return chosen, tokens


def recipe(
    model: PreTrainedModel, shape: Shape, units: list[Unit], folder: Path, *, disk: bool
) -> None:
    """Keep two float16 matrices per layer, inputs and x1, as public trainers do.

    Args:
        disk: Keep them in memory maps under `folder`, not in memory.
    """
    tokens = sum(unit.tokens for unit in units)
    widths = {"x": shape.hidden_size, "x1": shape.ffn_width}
    matrices: dict[tuple[str, int], Any] = {}
    for layer in shape.layers:
        for name, width in widths.items():
            size = (tokens, width)
            matrices[name, layer] = (
                np.memmap(folder / f"{name}-{layer}.mmap", np.float16, "w+", shape=size)
                if disk
                else np.empty(size, np.float16)
            )
    kept_N = torch.zeros(0, dtype=torch.bool)
    row = 0

    def keep(layer: int, x_ND: Tensor, x1_NF: Tensor) -> None:
        for name, value in (("x", x_ND), ("x1", x1_NF)):
            part = value[kept_N.to(value.device)].half().cpu().numpy()
            matrices[name, layer][row : row + len(part)] = part

    with Recorder(model, keep):
        for unit in units:
            for batch in unit.batches:
                kept_N = batch.keep_BS.flatten()
                _forward(model, batch)
                row += batch.tokens
    if disk:
        for matrix in matrices.values():
            matrix.flush()


def write_seconds(folder: Path, n_bytes: int) -> float:
    """Seconds to write and sync `n_bytes` of random data in files of a shard's size, one by one.

    Writes at least `MIN_WRITE_BYTES` and scales the time down.
    """
    total = max(n_bytes, MIN_WRITE_BYTES)
    block = np.random.default_rng(0).bytes(SHARD_BYTES)
    start = time.perf_counter()
    for number in range(-(-total // SHARD_BYTES)):
        size = min(SHARD_BYTES, total - number * SHARD_BYTES)
        with (folder / f"write-{number}").open("wb", buffering=0) as file:
            file.write(block[:size])
            os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    empty(folder)
    return seconds * n_bytes / total


def empty(folder: Path) -> None:
    """Remove the files of a folder."""
    for path in folder.iterdir():
        path.unlink()
