"""The work of a collection as units that depend on corpus, tokenizer and options alone.

A unit is the batches of one shard. Whoever walks the plan meets the same units in the same order,
so ranks share the work by counting units, and a resumed run leaves out those whose file exists.

Shape letters: B batch, S sequence, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from sparsecast.core.text.tokens import COUNTED, Sequence, TokenBatch, by_length


@dataclass(frozen=True)
class Unit:
    """The batches of one shard, in the order of its rows."""

    split: str
    number: int
    batches: list[TokenBatch]

    @property
    def name(self) -> str:
        return shard_name(self.split, self.number)

    @property
    def stored(self) -> bool:
        return self.split != COUNTED

    @cached_property
    def tokens(self) -> int:
        return sum(batch.tokens for batch in self.batches)

    def ids(self) -> Tensor:
        """(T,) int32."""
        return torch.cat([b.ids_BS[b.keep_BS] for b in self.batches]).to(torch.int32)

    def positions(self) -> Tensor:
        """(T,) int32, place in the document."""
        places = [torch.arange(b.ids_BS.shape[1]).expand_as(b.ids_BS) for b in self.batches]
        kept = [place[b.keep_BS] for place, b in zip(places, self.batches, strict=True)]
        return torch.cat(kept).to(torch.int32)


@dataclass
class Tally:
    """What went into a plan so far, per split."""

    documents: dict[str, int] = field(default_factory=dict)
    truncated: dict[str, int] = field(default_factory=dict)

    def over(self, rows: Iterable[Sequence]) -> Iterator[Sequence]:
        for row in rows:
            self.documents[row.split] = self.documents.get(row.split, 0) + 1
            self.truncated[row.split] = self.truncated.get(row.split, 0) + row.truncated
            yield row


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:05d}.safetensors"


def units(
    rows: Iterable[Sequence], *, seq_len: int, batch_size: int, shard_tokens: int
) -> Iterator[Unit]:
    """Group the batches of every split into shards.

    Args:
        shard_tokens: A unit has at most this many tokens, or is a single batch.
    """
    open_: dict[str, list[TokenBatch]] = {}
    held: dict[str, int] = {}
    numbers: dict[str, int] = {}

    def close(split: str) -> Unit:
        number = numbers.get(split, 0)
        numbers[split], held[split] = number + 1, 0
        return Unit(split, number, open_.pop(split))

    for batch in by_length(rows, seq_len=seq_len, batch_size=batch_size):
        split = batch.split
        if split in open_ and held[split] + batch.tokens > shard_tokens:
            yield close(split)
        open_.setdefault(split, []).append(batch)
        held[split] = held.get(split, 0) + batch.tokens
    for split in list(open_):
        yield close(split)
