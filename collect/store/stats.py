"""Firing counts over every token of a collection, stored or only counted.

    <split>.layer.<i>.fired    (F,) int64       on how many tokens each neuron fired
    <split>.layer.<i>.active   (F + 1,) int64   how many tokens had that many active neurons

`<split>` is train, calibration, held-out or counted. PowerInfer's choice of hot and cold neurons
wants `fired`; true sparsity and its spread over tokens follow from `active`.

Shape letters: F FFN width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from sparsecast.collect.store.shard_reader import AGAIN
from sparsecast.core.errors import InputError
from sparsecast.core.files import read_bytes

STATS = "stats.safetensors"


@dataclass(frozen=True)
class TokenSparsity:
    """The sparsity of single tokens in one layer: shares of inactive neurons."""

    tokens: int
    mean: float
    """True sparsity."""
    std: float
    p5: float
    p50: float
    p95: float


@dataclass(frozen=True)
class Stats:
    """Both counts per split and layer; see above."""

    tables: dict[str, Tensor]

    def splits(self) -> list[str]:
        return sorted({name.partition(".")[0] for name in self.tables})

    def fired(self, layer: int, splits: Iterable[str] | None = None) -> Tensor:
        """Return (F,) int64 firing counts over the given splits, or over every token."""
        return self._sum(layer, "fired", splits)

    def token_sparsity(self, layer: int, splits: Iterable[str] | None = None) -> TokenSparsity:
        """Return the spread of sparsity over tokens of the given splits, or over all."""
        tokens_F = self._sum(layer, "active", splits).double()
        width = len(tokens_F) - 1
        sparsity_F = 1 - torch.arange(width + 1, dtype=torch.float64) / width
        total = tokens_F.sum().clamp_min(1)
        mean = (tokens_F * sparsity_F).sum() / total
        variance = (tokens_F * (sparsity_F - mean) ** 2).sum() / total
        share, rising = tokens_F.flip(0).cumsum(0) / total, sparsity_F.flip(0)

        def quantile(q: float) -> float:
            return float(rising[int(torch.searchsorted(share, q).clamp(0, width))])

        return TokenSparsity(
            tokens=int(tokens_F.sum()),
            mean=float(mean),
            std=float(variance.sqrt()),
            p5=quantile(0.05),
            p50=quantile(0.5),
            p95=quantile(0.95),
        )

    def _sum(self, layer: int, name: str, splits: Iterable[str] | None) -> Tensor:
        chosen = self.splits() if splits is None else list(splits)
        tables = [self.tables.get(f"{split}.layer.{layer}.{name}") for split in chosen]
        found = [table for table in tables if table is not None]
        if not found:
            raise KeyError(f"no {name} counts of layer {layer} for {', '.join(chosen)}")
        return torch.stack(found).sum(0)


def merge(
    shards: Iterable[tuple[str, Mapping[str, Tensor]]], layers: list[int], width: int
) -> Stats:
    """Add up the counts of (split, tensors of a shard) pairs."""
    tables: dict[str, Tensor] = {}
    for split, tensors in shards:
        for layer in layers:
            fired = tensors[f"layer.{layer}.fired"].long()
            active = torch.bincount(tensors[f"layer.{layer}.active"].long(), minlength=width + 1)
            for name, value in (("fired", fired), ("active", active)):
                key = f"{split}.layer.{layer}.{name}"
                tables[key] = tables[key] + value if key in tables else value
    return Stats(tables)


def write_stats(path: Path, stats: Stats) -> None:
    path.write_bytes(save(dict(sorted(stats.tables.items()))))


def read_stats(
    path: Path, want: str, tokens: Mapping[str, int], layers: list[int], width: int
) -> Stats:
    """Counts of the given tokens per split, layers and FFN width.

    Args:
        want: The file's checksum.

    Raises:
        InputError: The file is missing, not as it was written, or holds other counts than these.
    """
    data = read_bytes(path, "the statistics of a `sparsecast collect` folder")
    if (found := xxhash.xxh3_128_hexdigest(data)) != want:
        raise InputError(f"{path}: damaged, its checksum is {found}, expected {want}; {AGAIN}")
    try:
        tables = load(data)
    except SafetensorError as error:
        raise InputError(f"{path}: damaged ({error}); {AGAIN}") from error
    for split, total in tokens.items():
        for layer in layers:
            fired = tables.get(f"{split}.layer.{layer}.fired", torch.empty(0))
            active = tables.get(f"{split}.layer.{layer}.active", torch.empty(0))
            if not _counts(fired, active, total, width):
                raise InputError(
                    f"{path}: holds no counts of the {total:,} {split} tokens in layer {layer}; "
                    f"{AGAIN}"
                )
    return Stats(tables)


def _counts(fired: Tensor, active: Tensor, tokens: int, width: int) -> bool:
    """Return whether these can be the two counts of one layer on so many tokens."""
    if (fired.dtype, active.dtype) != (torch.int64, torch.int64):
        return False
    if (fired.shape, active.shape) != ((width,), (width + 1,)) or int(active.min()) < 0:
        return False
    entries = int((active * torch.arange(width + 1)).sum())
    within = 0 <= int(fired.min()) <= int(fired.max()) <= tokens
    return within and int(active.sum()) == tokens and int(fired.sum()) == entries
