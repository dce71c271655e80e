"""Units of work: the token batches of one shard each.

Units depend on corpus, tokenizer and options alone, so every rank and every resumed run sees the
same units in the same order: ranks share them by number, and a resumed run skips those whose file
exists.

Shape letters: B batch, S sequence, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from sparsecast.core.text.tokens import COUNTED, Sequence, TokenBatch, batch_by_length


class ShardInfo(NamedTuple):
    """A shard as the store's manifest lists it."""

    split: str
    tokens: int
    name: str
    """Its file in the store's folder."""


@dataclass(frozen=True)
class Unit:
    """The batches of one shard, in the order of its rows."""

    split: str
    number: int
    batches: list[TokenBatch]

    @property
    def info(self) -> ShardInfo:
        return ShardInfo(self.split, self.tokens, shard_name(self.split, self.number))

    @property
    def stored(self) -> bool:
        """Return whether activations are stored, not only counted."""
        return self.split != COUNTED

    @cached_property
    def tokens(self) -> int:
        return sum(batch.tokens for batch in self.batches)

    def ids(self) -> Tensor:
        """Return (T,) int32 token ids."""
        return torch.cat([b.ids_BS[b.keep_BS] for b in self.batches]).to(torch.int32)

    def positions(self) -> Tensor:
        """Return (T,) int32, the position of each token in its sequence."""
        grids = [torch.arange(b.ids_BS.shape[1]).expand_as(b.ids_BS) for b in self.batches]
        kept = [grid[b.keep_BS] for grid, b in zip(grids, self.batches, strict=True)]
        return torch.cat(kept).to(torch.int32)


@dataclass
class Tally:
    """Documents read so far, per split."""

    documents: dict[str, int] = field(default_factory=dict)
    truncated: dict[str, int] = field(default_factory=dict)
    """Those longer than a sequence."""
    windows: int = 0
    """Sequences of the long ones."""

    def over(self, rows: Iterable[Sequence]) -> Iterator[Sequence]:
        """Pass `rows` through and count them."""
        for row in rows:
            if row.first:
                self.documents[row.split] = self.documents.get(row.split, 0) + 1
                self.truncated[row.split] = self.truncated.get(row.split, 0) + row.truncated
            self.windows += row.truncated or not row.first
            yield row


def shard_name(split: str, number: int) -> str:
    """Return the file name of a shard."""
    return f"{split}-{number:05d}.safetensors"


def units(
    rows: Iterable[Sequence], *, seq_len: int, batch_size: int, shard_tokens: int
) -> Iterator[Unit]:
    """Group the batches of every split into shards.

    Args:
        shard_tokens: Most tokens of a unit; a larger batch makes a unit of its own.
    """
    open_: dict[str, list[TokenBatch]] = {}
    held: dict[str, int] = {}
    numbers: dict[str, int] = {}

    def close(split: str) -> Unit:
        number = numbers.get(split, 0)
        numbers[split], held[split] = number + 1, 0
        return Unit(split, number, open_.pop(split))

    for batch in batch_by_length(rows, seq_len=seq_len, batch_size=batch_size):
        split = batch.split
        if split in open_ and held[split] + batch.tokens > shard_tokens:
            yield close(split)
        open_.setdefault(split, []).append(batch)
        held[split] = held.get(split, 0) + batch.tokens
    for split in list(open_):
        yield close(split)
