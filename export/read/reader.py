"""Read a PWRI or GGUF version 3 file without the library that writes them.

Layout (PowerInfer's ggml.c, `gguf_init_from_file`; little endian):

    magic "PWRI" or "GGUF", u32 version, u64 tensors, u64 keys
    per key     string name, u32 value type, value
    per tensor  string name, u32 dimensions, u64 each (fastest first), u32 type, u64 offset
    padding to the alignment, then the data; offsets count from here

A string is a u64 length and bytes; an array is a u32 element type, a u64 count and the elements.
`TYPES` lists the types of tensors. Nothing in the file is trusted: every length is compared with
the remaining bytes before it is used.
"""

from __future__ import annotations

import mmap
import struct
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparsecast.core.errors import InputError, shown
from sparsecast.core.files import check_file, unreadable_error
from sparsecast.core.options import short_repr

SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
STRING, ARRAY = 8, 9
UINT32, INT32, FLOAT32, BOOL, UINT64 = 4, 5, 6, 7, 10
MOST, MOST_STRINGS = 100_000, 2**21
"""Limits on tensors or keys and on strings in one array, far above any model and vocabulary."""
LONG = 2**20
"""Longest array that is read as a list; a longer one stays in the file, as a numpy view."""


class TensorType(NamedTuple):
    """A tensor type, which stores `block` elements in `nbytes` bytes."""

    name: str
    block: int
    nbytes: int
    dtype: torch.dtype = torch.float32
    """Dtype of the values that a reader gets."""


_COMMON = {
    0: TensorType("f32", 1, 4, torch.float32),
    1: TensorType("f16", 1, 2, torch.float16),
    2: TensorType("q4_0", 32, 18),
    3: TensorType("q4_1", 32, 20),
    6: TensorType("q5_0", 32, 22),
    7: TensorType("q5_1", 32, 24),
    8: TensorType("q8_0", 32, 34),
    9: TensorType("q8_1", 32, 40),
    10: TensorType("q2_K", 256, 84),
    11: TensorType("q3_K", 256, 110),
    12: TensorType("q4_K", 256, 144),
    13: TensorType("q5_K", 256, 176),
    14: TensorType("q6_K", 256, 210),
    15: TensorType("q8_K", 256, 292),
}
TYPES = {
    b"PWRI": {
        **_COMMON,
        16: TensorType("i8", 1, 1, torch.int8),
        17: TensorType("i16", 1, 2, torch.int16),
        18: TensorType("i32", 1, 4, torch.int32),
    },
    b"GGUF": {
        **_COMMON,
        16: TensorType("iq2_xxs", 256, 66),
        17: TensorType("iq2_xs", 256, 74),
        18: TensorType("iq3_xxs", 256, 98),
        19: TensorType("iq1_s", 256, 50),
        20: TensorType("iq4_nl", 32, 18),
        21: TensorType("iq3_s", 256, 110),
        22: TensorType("iq2_s", 256, 82),
        23: TensorType("iq4_xs", 256, 136),
        24: TensorType("i8", 1, 1, torch.int8),
        25: TensorType("i16", 1, 2, torch.int16),
        26: TensorType("i32", 1, 4, torch.int32),
        27: TensorType("i64", 1, 8, torch.int64),
        28: TensorType("f64", 1, 8, torch.float64),
        29: TensorType("iq1_m", 256, 56),
        30: TensorType("bf16", 1, 2, torch.bfloat16),
    },
}
"""Types by the magic at the beginning of the file.

Ids below 16 mean the same in both. From 16 on a PowerInfer file ("PWRI") has the integers that ggml
had when PowerInfer forked it; a "GGUF" file has what ggml put in their place since. (ggml.h of
PowerInfer at d3ebd7c; GGUF's specification.)
"""
DECODED = ("q4_0", "q8_0")
"""Block types whose values can be read. Tensors of other block types are only located."""


class Entry(NamedTuple):
    """Where one tensor is, and what it holds."""

    shape: tuple[int, ...]
    """Slowest dimension first, as in torch."""
    type: TensorType
    start: int
    """Offset from the beginning of the file, in bytes."""

    @property
    def nbytes(self) -> int:
        return prod(self.shape) // self.type.block * self.type.nbytes


class GGUFFile:
    """A memory-mapped file.

    `keys`, `key_types`, `element_types` (of arrays) and `entries` are read from the header, tensors
    on demand.

    Raises:
        InputError: Not such a file, truncated or inconsistent; names the file and the place.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        check_file(path, "a GGUF file")
        try:
            with path.open("rb") as file:
                # A private mapping: torch needs writable memory, and the file stays unchanged.
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except ValueError as error:
            raise InputError(f"{path}: is empty, expected a GGUF file") from error
        except OSError as error:
            raise unreadable_error(path, error, "a GGUF file") from error
        self._at = 0
        self.magic = self._take(4)
        if self.magic not in TYPES:
            raise InputError(f"{path}: begins with {self.magic!r}, expected {tuple(TYPES)}")
        self.version: int = self._scalar("I")
        if self.version != 3:
            raise InputError(f"{path}: is of GGUF version {self.version}, expected 3")
        n_tensors, n_keys = self._count(32, "tensors", MOST), self._count(13, "keys", MOST)
        self.keys: dict[str, Any] = {}
        self.key_types: dict[str, int] = {}
        self.element_types: dict[str, int] = {}
        for _ in range(n_keys):
            self._read_key()
        self.alignment = self._alignment()
        raw = [self._tensor_header() for _ in range(n_tensors)]
        self.data_start = -(-self._at // self.alignment) * self.alignment
        self.entries: dict[str, Entry] = {}
        for name, shape, type_, offset in raw:
            self._add(name, Entry(shape, type_, self.data_start + offset), offset)
        self._check_overlap()

    def tensor(self, name: str) -> Tensor:
        """Return a view of the mapped file in the stored dtype; pages are read on use.

        Quantized tensors are returned as their values in float32.
        """
        return self._values(name, self.entries[name])

    def rows(self, name: str, first: int, count: int) -> Tensor:
        """Return `count` rows of a tensor from `first` on, as `tensor` does; no other is read.

        The rows of a quantized tensor have to be whole blocks.
        """
        entry = self.entries[name]
        start = entry.start + entry.nbytes // entry.shape[0] * first
        return self._values(name, Entry((count, *entry.shape[1:]), entry.type, start))

    def blocks(self, name: str) -> tuple[Tensor, Tensor]:
        """Return scales (N,) float32 and codes (N, 32) int8 of a q8_0 or q4_0 tensor's blocks."""
        return self._blocks_of(self.entries[name])

    def _values(self, name: str, entry: Entry) -> Tensor:
        if not entry.nbytes:
            return torch.empty(entry.shape, dtype=entry.type.dtype)
        if entry.type.block > 1:
            if entry.type.name not in DECODED:
                raise InputError(
                    f"{self.path}: tensor {name} is {entry.type.name}, which is not supported"
                )
            scale, code = self._blocks_of(entry)
            return (scale[..., None] * code.float()).view(entry.shape)
        count = prod(entry.shape)
        flat = torch.frombuffer(self._data, dtype=entry.type.dtype, count=count, offset=entry.start)
        return flat.view(entry.shape)

    def _blocks_of(self, entry: Entry) -> tuple[Tensor, Tensor]:
        raw = torch.frombuffer(
            self._data, dtype=torch.uint8, count=entry.nbytes, offset=entry.start
        )
        return _blocks(raw.view(-1, entry.type.nbytes))

    def _broken(self, what: str) -> InputError:
        return InputError(f"{self.path}: {what}; the file is damaged, export it again")

    def _take(self, n: int) -> bytes:
        if n > len(self._data) - self._at:
            raise self._broken(
                f"ends at byte {len(self._data)}, but {n} bytes were expected from byte {self._at}"
            )
        self._at += n
        return self._data[self._at - n : self._at]

    def _scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))[0]

    def _count(self, least: int, what: str, most: int | None = None) -> int:
        """Read a count of items, and refuse more than the file can hold.

        Args:
            least: Bytes that an item takes at least.
            most: Largest count in any useful file.
        """
        value: int = self._scalar("Q")
        if value * least > len(self._data) - self._at:
            raise self._broken(
                f"claims {value} {what} at byte {self._at - 8}, more than it can hold"
            )
        if most is not None and value > most:
            raise InputError(
                f"{self.path}: claims {value:,} {what} at byte {self._at - 8}, expected at most "
                f"{most:,}; no model file has so many"
            )
        return value

    def _string(self) -> str:
        raw = self._take(self._count(1, "characters"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._broken(f"holds a text that is not UTF-8 before byte {self._at}") from error

    def _read_key(self) -> None:
        name = self._string()
        if name in self.keys:
            raise self._broken(f"has the key {shown(name)} twice")
        kind = self._scalar("I")
        self.key_types[name] = kind
        self.keys[name] = self._array(name) if kind == ARRAY else self._value(kind, name)

    def _value(self, kind: int, name: str) -> Any:
        if kind == STRING:
            return self._string()
        if kind not in SCALARS:
            raise self._broken(f"key {shown(name)} has the unknown value type {kind}")
        return self._scalar(SCALARS[kind])

    def _array(self, name: str) -> list[Any] | np.ndarray:
        kind: int = self._scalar("I")
        self.element_types[name] = kind
        if kind == STRING:
            count = self._count(8, f"strings in {shown(name)}", MOST_STRINGS)
            return [self._string() for _ in range(count)]
        if kind not in SCALARS:
            raise self._broken(f"key {shown(name)} is an array of the unknown value type {kind}")
        dtype = np.dtype("?" if kind == BOOL else "<" + SCALARS[kind])
        count = self._count(dtype.itemsize, f"values in {shown(name)}")
        start = self._at
        self._at += count * dtype.itemsize
        values = np.frombuffer(self._data, dtype, count, start) if count else np.empty(0, dtype)
        return values if count > LONG else values.tolist()

    def _alignment(self) -> int:
        value = self.keys.get("general.alignment", 32)
        if not isinstance(value, int) or not 1 <= value <= 2**16 or value & (value - 1):
            raise self._broken(
                f"general.alignment is {short_repr(value)}, expected a power of two up to 65,536"
            )
        return value

    def _tensor_header(self) -> tuple[str, tuple[int, ...], TensorType, int]:
        name = self._string()
        n_dims = self._scalar("I")
        if not 1 <= n_dims <= 4:
            raise self._broken(f"tensor {shown(name)} has {n_dims} dimensions, expected 1 to 4")
        shape = tuple(self._scalar("Q") for _ in range(n_dims))[::-1]
        kind, offset = self._scalar("I"), self._scalar("Q")
        types = TYPES[self.magic]
        if kind not in types:
            known = ", ".join(f"{i} ({t.name})" for i, t in types.items())
            raise InputError(
                f"{self.path}: tensor {shown(name)} has type id {kind}, expected {known}"
            )
        return name, shape, types[kind], offset

    def _add(self, name: str, entry: Entry, offset: int) -> None:
        if name in self.entries:
            raise self._broken(f"has the tensor {shown(name)} twice")
        # As in the engine, rows may straddle blocks here; `check_tensors` refuses that. A layer
        # without neurons on the GPU has an empty list.
        empty = not prod(entry.shape) and (entry.type.name != "i32" or len(entry.shape) > 1)
        if empty or prod(entry.shape) % entry.type.block:
            raise self._broken(f"tensor {shown(name)} has the shape {entry.shape}")
        if offset % self.alignment:
            raise self._broken(
                f"tensor {shown(name)} begins at {offset}, not at a multiple of {self.alignment}"
            )
        if entry.start + entry.nbytes > len(self._data):
            raise self._broken(
                f"tensor {shown(name)} ends at byte {entry.start + entry.nbytes}, but the file has "
                f"{len(self._data)}: truncated"
            )
        self.entries[name] = entry

    def _check_overlap(self) -> None:
        end, before = self.data_start, ""
        places = sorted(self.entries.items(), key=lambda item: (item[1].start, item[1].nbytes))
        for name, entry in places:
            if entry.start < end:
                raise self._broken(f"tensors {shown(before)} and {shown(name)} overlap")
            end, before = entry.start + entry.nbytes, name


def _blocks(blocks_NB: Tensor) -> tuple[Tensor, Tensor]:
    """Split N blocks into scales (N,) and codes (N, 32).

    A block has an f16 scale. Then come 32 signed bytes (q8_0), or 16 bytes with values 0 to 15 in
    their low halves and 16 to 31 in their high halves, where 8 stands for 0 (q4_0).
    """
    scale_N = blocks_NB[:, :2].clone().view(torch.float16).float()[:, 0]
    codes = blocks_NB[:, 2:]
    if codes.shape[1] == 32:
        return scale_N, codes.clone().view(torch.int8)
    return scale_N, torch.cat([codes & 15, codes >> 4], dim=1).to(torch.int8) - 8
