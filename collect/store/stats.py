"""Firing counts over every token of a collection, stored or only counted.

    <split>.layer.<i>.fired    (F,) int64       on how many tokens each neuron fired
    <split>.layer.<i>.active   (F + 1,) int64   how many tokens had that many active neurons

In a mixture of experts both have E rows, one for each expert of the layer, over the tokens that
were routed to it.

`<split>` is train, calibration, held-out or counted. PowerInfer's choice of hot and cold neurons
wants `fired`; true sparsity and its spread over tokens follow from `active`.

Shape letters: F FFN width, E experts.
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
from sparsecast.core.models.ffns import ffn_numbers, place_of

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
    """Both counts per split and layer; see above. FFNs are numbered as in core/models/ffns.py."""

    tables: dict[str, Tensor]
    experts: int = 0
    """Experts per layer; 0 in a dense model."""

    def splits(self) -> list[str]:
        return sorted({name.partition(".")[0] for name in self.tables})

    def fired(self, ffn: int, splits: Iterable[str] | None = None) -> Tensor:
        """Return (F,) int64 firing counts over the given splits, or over every token."""
        return self._sum(ffn, "fired", splits)

    def token_sparsity(self, ffn: int, splits: Iterable[str] | None = None) -> TokenSparsity:
        """Return the spread of sparsity over tokens of the given splits, or over all."""
        return _spread(self._sum(ffn, "active", splits))

    def layer_sparsity(self, layer: int) -> TokenSparsity:
        """Return the spread over every token of a layer, a token counting once per expert that it
        was routed to."""
        tables = [self._sum(ffn, "active", None) for ffn in self.ffns(layer)]
        return _spread(torch.stack(tables).sum(0))

    def ffns(self, layer: int) -> list[int]:
        """Return the FFNs of a layer: its experts, or itself in a dense model."""
        return ffn_numbers([layer], self.experts)

    def _sum(self, ffn: int, name: str, splits: Iterable[str] | None) -> Tensor:
        chosen = self.splits() if splits is None else list(splits)
        layer, expert = place_of(ffn, self.experts)
        tables = [self.tables.get(f"{split}.layer.{layer}.{name}") for split in chosen]
        found = [table for table in tables if table is not None]
        if not found:
            raise KeyError(f"no {name} counts of layer {layer} for {', '.join(chosen)}")
        total = torch.stack(found).sum(0)
        return total if expert is None else total[expert]


def _spread(tokens: Tensor) -> TokenSparsity:
    """Return the spread of a table of how many tokens had that many active neurons, (F + 1,)."""
    tokens_F = tokens.double()
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


def merge(
    shards: Iterable[tuple[str, Mapping[str, Tensor]]],
    layers: list[int],
    width: int,
    experts: int = 0,
) -> Stats:
    """Add up the counts of (split, tensors of a shard) pairs."""
    tables: dict[str, Tensor] = {}
    for split, tensors in shards:
        for layer in layers:
            fired = tensors[f"layer.{layer}.fired"].long()
            active = tensors[f"layer.{layer}.active"].long()
            if experts:
                active += (width + 1) * tensors[f"layer.{layer}.chosen"]
            active = torch.bincount(active.flatten(), minlength=max(1, experts) * (width + 1))
            active = active.view(experts, width + 1) if experts else active
            for name, value in (("fired", fired), ("active", active)):
                key = f"{split}.layer.{layer}.{name}"
                tables[key] = tables[key] + value if key in tables else value
    return Stats(tables, experts)


def write_stats(path: Path, stats: Stats) -> None:
    path.write_bytes(save(dict(sorted(stats.tables.items()))))


def read_stats(
    path: Path,
    want: str,
    tokens: Mapping[str, int],
    layers: list[int],
    width: int,
    experts: tuple[int, int] = (0, 0),
) -> Stats:
    """Counts of the given tokens per split, layers and FFN width.

    Args:
        want: The file's checksum.
        experts: Experts per layer and per token; zeros for a dense model.

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
            if not _counts(fired, active, total, width, experts):
                raise InputError(
                    f"{path}: holds no counts of the {total:,} {split} tokens in layer {layer}; "
                    f"{AGAIN}"
                )
    return Stats(tables, experts[0])


def _counts(
    fired: Tensor, active: Tensor, tokens: int, width: int, experts: tuple[int, int]
) -> bool:
    """Return whether these can be the two counts of one layer on so many tokens."""
    if (fired.dtype, active.dtype) != (torch.int64, torch.int64):
        return False
    count, chosen = experts
    rows = (count,) if count else ()
    if (fired.shape, active.shape) != ((*rows, width), (*rows, width + 1)):
        return False
    if int(active.min()) < 0 or int(fired.min()) < 0:
        return False
    routed_E, most_E = active.sum(-1), fired.amax(-1)
    entries_E = (active * torch.arange(width + 1)).sum(-1)
    return (
        int(routed_E.sum()) == tokens * max(1, chosen)
        and bool((most_E <= routed_E).all() and (routed_E <= tokens).all())
        and torch.equal(fired.sum(-1), entries_E)
    )
