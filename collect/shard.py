"""The layout of one shard: a safetensors file whose bytes are filled in place.

    id            (T,) int32           token ids
    position      (T,) int32           place in the document
    layer.<i>.fired   (F,) int32       on how many of the T tokens each neuron fired
    layer.<i>.active  (T,) int32       how many neurons fired on each token
    layer.<i>.scale   (T,) float32     int8 inputs only: x = scale * layer.<i>.x
    layer.<i>.x       (T, D)           predictor inputs: float16, bfloat16, float32 or int8
    layer.<i>.mask    (T, P) uint8     what fired, see bits.py
    layer.<i>.energy  (N,) uint8       with energies only, see energy.py

Shards of counted tokens have `id`, `position`, `fired` and `active` alone. The header's metadata
holds `xxh3_128`, the checksum of everything behind the header.

The safetensors library builds a file from tensors that exist; here the tensors are views of one
host buffer that is the file, so that a device copies into place and a shard is never held twice.

Shape letters: T tokens, D hidden, F FFN width, P packed width, N active entries.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import xxhash
from torch import Tensor

SHARD_BYTES = 128 * 2**20
CHECKSUM = "xxh3_128"
INPUT_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "int8": torch.int8,
}
_CODES = {
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
    """What decides a shard's layout, but for its number of tokens."""

    layers: Sequence[int]
    hidden_size: int
    ffn_width: int
    x_dtype: str
    """A key of `INPUT_DTYPES`."""
    energy: bool = False

    @property
    def token_bytes(self) -> int:
        """Bytes per token over all layers, without energies."""
        return sum(f.nbytes for f in self.fields(1)) - sum(f.nbytes for f in self._fired())

    @property
    def bound(self) -> float:
        """Bytes per token and layer that a store may take: inputs and masks, and 2 %.

        Energies add one byte per active entry.
        """
        scale = 4 if self.x_dtype == "int8" else 0
        itemsize = INPUT_DTYPES[self.x_dtype].itemsize
        return 1.02 * (itemsize * self.hidden_size + scale + self.ffn_width / 8)

    def fields(self, tokens: int, *, stored: bool = True) -> list[Field]:
        """All tensors but energies in file order, wider types first so that each is aligned."""
        counts = [
            Field("id", torch.int32, (tokens,)),
            Field("position", torch.int32, (tokens,)),
            *self._fired(),
            *(Field(f"layer.{i}.active", torch.int32, (tokens,)) for i in self.layers),
        ]
        if not stored:
            return counts
        dtype, packed = INPUT_DTYPES[self.x_dtype], -(-self.ffn_width // 8)
        scales = [Field(f"layer.{i}.scale", torch.float32, (tokens,)) for i in self.layers]
        return [
            *counts,
            *(scales if self.x_dtype == "int8" else ()),
            *(Field(f"layer.{i}.x", dtype, (tokens, self.hidden_size)) for i in self.layers),
            *(Field(f"layer.{i}.mask", torch.uint8, (tokens, packed)) for i in self.layers),
        ]

    def nbytes(self, tokens: int) -> int:
        return sum(field.nbytes for field in self.fields(tokens))

    def misfit(self, tensors: dict[str, Tensor], tokens: int, *, stored: bool = True) -> str | None:
        """What keeps `tensors` from being a shard of this shape; None where nothing does."""
        fields = self.fields(tokens, stored=stored)
        if self.energy and stored:
            for layer in self.layers:
                active = tensors.get(f"layer.{layer}.active", torch.zeros(0))
                fields.append(Field(f"layer.{layer}.energy", torch.uint8, (int(active.sum()),)))
        for field in fields:
            found = tensors.get(field.name)
            if found is None:
                return f"{field.name} is missing"
            if (found.dtype, tuple(found.shape)) != (field.dtype, field.shape):
                return (
                    f"{field.name} is {_CODES.get(found.dtype, found.dtype)} {list(found.shape)}, "
                    f"expected {_CODES[field.dtype]} {list(field.shape)}"
                )
        extra = sorted(set(tensors) - {field.name for field in fields})
        return f"{extra[0]} has no place in it" if extra else None

    def _fired(self) -> list[Field]:
        return [Field(f"layer.{i}.fired", torch.int32, (self.ffn_width,)) for i in self.layers]


class Image:
    """A host buffer that becomes one shard file after another.

    Memory: `capacity` bytes for as long as it lives, plus the energies of one shard.
    """

    def __init__(self, shape: Shape, capacity: int, *, pinned: bool) -> None:
        self._shape = shape
        self._data = torch.empty(capacity, dtype=torch.uint8, pin_memory=pinned)
        self.largest = torch.zeros(len(shape.layers) + 1, pin_memory=pinned)
        """Per layer the largest magnitude of an input, before it was cast; then that of the last
        layer's x1, whose overflow no later input would show."""
        self._fields: list[Field] = []
        self._size = 0
        self.views: dict[str, Tensor] = {}
        self.energies: dict[int, list[Tensor]] = {}

    def begin(self, tokens: int, *, stored: bool) -> None:
        """Lay out the next shard; `views` then holds its tensors, not yet filled."""
        self._fields = self._shape.fields(tokens, stored=stored)
        self.views, self._size = {}, 0
        for field in self._fields:
            part = self._data[self._size : self._size + field.nbytes]
            self.views[field.name] = part.view(field.dtype).view(field.shape)
            self._size += field.nbytes
        self.energies = {i: [] for i in self._shape.layers} if self._shape.energy and stored else {}

    @property
    def energy_bytes(self) -> int:
        """One for each active entry, where energies are recorded."""
        return sum(len(part) for parts in self.energies.values() for part in parts)

    @property
    def nbytes(self) -> int:
        """Of the finished file."""
        return len(_header(self._all_fields(), "0" * 32)) + self._size + self.energy_bytes

    def _all_fields(self) -> list[Field]:
        return self._fields + [
            Field(f"layer.{layer}.energy", torch.uint8, (sum(len(p) for p in parts),))
            for layer, parts in self.energies.items()
        ]

    def blocks(self) -> Iterator[memoryview]:
        """The finished file, in order, checksum included."""
        data = [self._data[: self._size], *(p for parts in self.energies.values() for p in parts)]
        fields = self._all_fields()
        digest = xxhash.xxh3_128()
        for part in data:
            digest.update(part.numpy().data)
        yield memoryview(_header(fields, digest.hexdigest()))
        for part in data:
            yield part.numpy().data


def _header(fields: list[Field], checksum: str) -> bytes:
    """Length and JSON header as the safetensors format has them."""
    table: dict[str, object] = {"__metadata__": {CHECKSUM: checksum}}
    offset = 0
    for field in fields:
        table[field.name] = {
            "dtype": _CODES[field.dtype],
            "shape": list(field.shape),
            "data_offsets": [offset, offset + field.nbytes],
        }
        offset += field.nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
