"""The rounds of `sparsecast bench collect`, and the numbers that follow from their times."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from transformers import PreTrainedModel

from sparsecast.cli.bench.collect_runs import (
    bare,
    empty,
    recipe,
    recipe_share,
    recording,
    write_seconds,
)
from sparsecast.cli.bench.rounds import median_ratio, medians, timed
from sparsecast.collect.store.shard import Shape, ShardBuffer
from sparsecast.collect.store.units import Unit
from sparsecast.collect.store.writer import Writer, to_folder, to_memory
from sparsecast.core.progress import progress_bar


@dataclass(frozen=True)
class Workload:
    """The model and the batches that are timed, and the layout they are recorded in."""

    model: PreTrainedModel
    shape: Shape
    units: list[Unit]

    @property
    def tokens(self) -> int:
        return sum(unit.tokens for unit in self.units)


class Sink:
    """Stores finished shards and counts their bytes, those of energies separately."""

    def __init__(self, folder: Path | None) -> None:
        """
        Args:
            folder: Where shards are written; None: they are dropped.
        """
        self._write = None if folder is None else to_folder(folder)
        self._lock = Lock()
        self.clear()

    def clear(self) -> None:
        """Set the counts to 0."""
        self.written = self.energies = 0

    def __call__(self, name: str, buffer: ShardBuffer) -> None:
        if self._write is None:
            written = to_memory(name, buffer)
        else:
            self._write(name, buffer)
            written = buffer.nbytes
        with self._lock:
            self.written += written
            self.energies += buffer.energy_bytes


def run_rounds(work: Workload, rounds: int, folder: Path, *, to_disk: bool) -> dict[str, Any]:
    """Time `rounds` rounds after one that is not counted; rates, ratios and bytes by JSON key."""
    model, shape = work.model, work.shape
    sink = Sink(folder if to_disk else None)
    capacity = shape.nbytes(max(unit.tokens for unit in work.units))
    seconds: dict[str, list[float]] = {}
    with (
        Writer(shape, capacity, sink, pinned=model.device.type == "cuda") as writer,
        progress_bar("bench", rounds + 1) as progress,
        torch.inference_mode(),
    ):
        for number in range(rounds + 1):
            took = _round(work, writer, sink, folder, to_disk=to_disk)
            progress.advance()
            if number:
                for name, value in took.items():
                    seconds.setdefault(name, []).append(value)
    return _numbers(work, seconds, sink)


def _round(
    work: Workload, writer: Writer, sink: Sink, folder: Path, *, to_disk: bool
) -> dict[str, float]:
    """Seconds of each run of one round."""
    model, shape, units = work.model, work.shape, work.units

    devices = {weight.device for weight in model.parameters()}

    def seconds(run: Callable[[], object]) -> float:
        return timed(run, *devices)

    sink.clear()
    took = {"bare": seconds(lambda: bare(model, units)) / 2}
    took["recording"] = seconds(lambda: recording(model, shape, units, writer))
    took["bare"] += seconds(lambda: bare(model, units)) / 2
    if to_disk:
        empty(folder)
        took["write"] = write_seconds(folder, sink.written)
    few, _ = recipe_share(shape, units)
    took["recipe"] = seconds(lambda: recipe(model, shape, few, folder, disk=to_disk))
    empty(folder)
    return took


def _numbers(work: Workload, seconds: dict[str, list[float]], sink: Sink) -> dict[str, Any]:
    shape, tokens = work.shape, work.tokens
    _, recipe_tokens = recipe_share(shape, work.units)
    counts = {"bare": tokens, "recording": tokens, "recipe": recipe_tokens}
    typical = medians(seconds)
    speed = {name: count / typical[name] for name, count in counts.items()}
    kept = [b / r for b, r in zip(seconds["bare"], seconds["recording"], strict=True)]
    values: dict[str, Any] = {
        "kept": statistics.median(kept),
        "kept_rounds": kept,
        "tokens_per_s": speed,
        "bytes_per_token_layer": sink.written / tokens / len(shape.layers),
        "bound": shape.bound + sink.energies / tokens / len(shape.layers),
        "recipe_bytes_per_token_layer": 2 * (shape.hidden_size + shape.ffn_width),
        "write_mb_per_s": None,
        "kept_of_limit": None,
        "recipe_kept": speed["recipe"] / speed["bare"],
    }
    if "write" in seconds:
        slower = [max(pair) for pair in zip(seconds["bare"], seconds["write"], strict=True)]
        values["write_mb_per_s"] = statistics.median(
            sink.written / 1e6 / s for s in seconds["write"]
        )
        values["kept_of_limit"] = median_ratio(slower, seconds["recording"])
    return values
