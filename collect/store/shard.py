"""The layout of one shard: a safetensors file whose bytes are filled in place.

    id            (T,) int32           token ids
    position      (T,) int32           place in the document
    layer.<i>.fired   (F,) int32       on how many of the T tokens each neuron fired
    layer.<i>.active  (T,) int32       how many neurons fired on each token
    layer.<i>.scale   (T,) float32     int8 inputs only: x = scale * layer.<i>.x
    layer.<i>.x       (T, D)           predictor inputs: float16, bfloat16, float32 or int8
    layer.<i>.mask    (T, P) uint8     what fired, see core/bitmask.py
    layer.<i>.energy  (N,) uint8       with energies only, see energy.py

Mixtures of experts have (E, F) counts in `fired`, (T, k) in `active`, (T, k, P) in `mask`, and

    layer.<i>.chosen  (T, k) int32     the experts whose `active` and `mask` these are

Shards of counted tokens have no `scale`, `x` and `mask`. The header's metadata says which shard
this is, as `split` and `number`, and holds the xxh3_128 of every tensor under the tensor's name.

The safetensors library builds a file from tensors that exist; here the tensors are views of one
host buffer that is the file, so that a device copies into place and a shard is never held twice.

Shape letters: T tokens, D hidden, F FFN width, P packed width, N active entries, E experts, k
experts per token.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import xxhash
from torch import Tensor

from sparsecast.core.options import short_repr

SHARD_BYTES = 128 * 2**20
"""Size of a full shard."""
INPUT_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "int8": torch.int8,
}
CODES = {
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
    torch.uint8: "U8",
}


class Field(NamedTuple):
    """One tensor of a shard."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What decides a shard's layout, except its number of tokens."""

    layers: Sequence[int]
    hidden_size: int
    ffn_width: int
    x_dtype: str
    """A key of `INPUT_DTYPES`."""
    energy: bool = False
    experts: int = 0
    """Experts per layer in a mixture of experts; 0 in a dense model."""
    experts_per_token: int = 0

    @property
    def token_bytes(self) -> int:
        """Return the bytes per token over all layers, without energies."""
        return sum(f.nbytes for f in self.fields(1)) - sum(f.nbytes for f in self._fired())

    @property
    def shard_tokens(self) -> int:
        """Return the number of tokens after which a shard is full."""
        return max(1, SHARD_BYTES // self.token_bytes)

    @property
    def bound(self) -> float:
        """Return the bound of bytes per token and layer: inputs, masks, and 2 %.

        Energies add one byte per active entry. In a mixture of experts a token has a mask, a count
        and a number for each of its experts, and a shard the firing counts of every expert.
        """
        scale = 4 if self.x_dtype == "int8" else 0
        itemsize = INPUT_DTYPES[self.x_dtype].itemsize
        masks = self.ffn_width / 8
        if self.experts:
            masks = self.experts_per_token * (masks + 8)
            masks += 4 * self.experts * self.ffn_width / self.shard_tokens
        return 1.02 * (itemsize * self.hidden_size + scale + masks)

    def fields(self, tokens: int, *, stored: bool = True) -> list[Field]:
        """Return all tensors but energies in file order, wider types first for alignment."""
        each = (tokens, self.experts_per_token) if self.experts else (tokens,)
        chosen = [Field(f"layer.{i}.chosen", torch.int32, each) for i in self.layers]
        counts = [
            Field("id", torch.int32, (tokens,)),
            Field("position", torch.int32, (tokens,)),
            *self._fired(),
            *(Field(f"layer.{i}.active", torch.int32, each) for i in self.layers),
            *(chosen if self.experts else ()),
        ]
        if not stored:
            return counts
        dtype, packed = INPUT_DTYPES[self.x_dtype], -(-self.ffn_width // 8)
        scales = [Field(f"layer.{i}.scale", torch.float32, (tokens,)) for i in self.layers]
        return [
            *counts,
            *(scales if self.x_dtype == "int8" else ()),
            *(Field(f"layer.{i}.x", dtype, (tokens, self.hidden_size)) for i in self.layers),
            *(Field(f"layer.{i}.mask", torch.uint8, (*each, packed)) for i in self.layers),
        ]

    def nbytes(self, tokens: int) -> int:
        return sum(field.nbytes for field in self.fields(tokens))

    def misfit(self, found: Mapping[str, Field], tokens: int, *, stored: bool = True) -> str | None:
        """Describe how `found` differs from a shard of this shape; None if it does not.

        How many energies there are, the active entries say; see `ActivationStore`.
        """
        fields = self.fields(tokens, stored=stored)
        if self.energy and stored:
            fields += [
                Field(name, torch.uint8, found[name].shape[:1] if name in found else (0,))
                for name in (f"layer.{layer}.energy" for layer in self.layers)
            ]
        for field in fields:
            there = found.get(field.name)
            if there is None:
                return f"{field.name} is missing"
            if there != field:
                return (
                    f"{field.name} is {CODES[there.dtype]} {list(there.shape)}, "
                    f"expected {CODES[field.dtype]} {list(field.shape)}"
                )
        extra = sorted(set(found) - {field.name for field in fields})
        return f"{short_repr(extra[0])} has no place in it" if extra else None

    def _fired(self) -> list[Field]:
        counts = (self.experts, self.ffn_width) if self.experts else (self.ffn_width,)
        return [Field(f"layer.{i}.fired", torch.int32, counts) for i in self.layers]


class ShardBuffer:
    """A host buffer that becomes one shard file after another.

    Memory: `capacity` bytes for as long as it lives, plus the energies of one shard.
    """

    def __init__(self, shape: Shape, capacity: int, *, pinned: bool) -> None:
        self._shape = shape
        self._data = torch.empty(capacity, dtype=torch.uint8, pin_memory=pinned)
        self.largest = torch.zeros(len(shape.layers) + 1, pin_memory=pinned)
        """Per layer the largest magnitude of an input, before it was cast; then that of the last
        layer's x1, whose overflow no later input would show."""
        self._split, self._number = "", 0
        self._fields: list[Field] = []
        self._size = 0
        self.views: dict[str, Tensor] = {}
        self.energies: dict[int, list[Tensor]] = {}

    def begin(self, tokens: int, *, split: str, number: int, stored: bool = True) -> None:
        """Lay out the next shard; `views` then holds its tensors, not yet filled."""
        self._split, self._number = split, number
        self._fields = self._shape.fields(tokens, stored=stored)
        self.views, self._size = {}, 0
        for field in self._fields:
            part = self._data[self._size : self._size + field.nbytes]
            self.views[field.name] = part.view(field.dtype).view(field.shape)
            self._size += field.nbytes
        self.energies = {i: [] for i in self._shape.layers} if self._shape.energy and stored else {}

    @property
    def energy_bytes(self) -> int:
        """Return the bytes of energies: one per active entry, if they are recorded."""
        return sum(len(part) for parts in self.energies.values() for part in parts)

    @property
    def nbytes(self) -> int:
        """Return the size of the finished file."""
        return len(self._header(["0" * 32] * len(self._all_fields()))) + sum(
            field.nbytes for field in self._all_fields()
        )

    def _all_fields(self) -> list[Field]:
        return self._fields + [
            Field(f"layer.{layer}.energy", torch.uint8, (sum(len(p) for p in parts),))
            for layer, parts in self.energies.items()
        ]

    def blocks(self) -> Iterator[memoryview]:
        """Yield the finished file in order, checksums included."""
        sums = [checksum([view]) for view in self.views.values()]
        sums += [checksum(parts) for parts in self.energies.values()]
        yield memoryview(self._header(sums))
        yield self._data[: self._size].numpy().data
        for parts in self.energies.values():
            for part in parts:
                yield part.numpy().data

    def _header(self, sums: Sequence[str]) -> bytes:
        """Return length and JSON header in the safetensors format."""
        fields, offset = self._all_fields(), 0
        named = {field.name: value for field, value in zip(fields, sums, strict=True)}
        table: dict[str, object] = {
            "__metadata__": {"split": self._split, "number": str(self._number), **named}
        }
        for field in fields:
            table[field.name] = {
                "dtype": CODES[field.dtype],
                "shape": list(field.shape),
                "data_offsets": [offset, offset + field.nbytes],
            }
            offset += field.nbytes
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def checksum(parts: Iterable[Tensor]) -> str:
    """Return the xxh3_128 of the concatenated bytes of contiguous tensors."""
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(part.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
