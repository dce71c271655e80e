"""Read shards, and verify each tensor's checksum before its first use.

The store's manifest has the checksum of every shard's header, and the header that of every tensor.
Opening a shard reads only its header. A whole tensor is hashed on first access, which also brings
its pages into memory: no page is read twice, unused tensors are never read, and later accesses cost
nothing. xxh3 hashes more than 10 GB/s per thread, several times the rate of disks. Inputs are
checked for NaN and infinity at the same time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from os import fstat
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparsecast.collect.store.shard import CODES, Field, checksum
from sparsecast.collect.store.units import shard_name
from sparsecast.core.errors import InputError, shown
from sparsecast.core.files import check_file, parse_json, unreadable_error
from sparsecast.core.manifests import is_count

AGAIN = "copy the folder again, or remove it and collect again"
WHAT = "a shard of activations"
_DTYPES = {code: dtype for dtype, code in CODES.items()}


class Header(NamedTuple):
    """A shard's header: its fields and checksums."""

    checksum: str
    """Checksum of the header itself."""
    fields: dict[str, Field]
    """By name, in file order."""
    sums: dict[str, str]
    """Name of a tensor to its checksum."""


class ShardFile(Mapping[str, Tensor]):
    """One shard's tensors as views of its memory map.

    Safe to read from several threads, which may then check a tensor twice.

    Args:
        want: The checksum of its header, where a manifest states it.

    Raises:
        InputError: No such file, cut short, not as it was written, or another shard under this
            name; when a tensor is first read: it is not as it was written, or an input that is not
            finite.
    """

    def __init__(self, path: Path, want: str | None = None) -> None:
        self.path = path
        self.header = read_header(path, want)
        self._checked: set[str] = set()
        try:
            with safe_open(path, framework="pt") as file:
                self._tensors: dict[str, Tensor] = {
                    name: file.get_tensor(name) for name in self.header.fields
                }
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: damaged ({error}); {AGAIN}") from error

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        if name not in self._checked:
            self._check(name, tensor)
            self._checked.add(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def check(self) -> None:
        """Read every tensor."""
        for name in self:
            self[name]

    def _check(self, name: str, tensor: Tensor) -> None:
        found, states = checksum([tensor]), self.header.sums[name]
        if found != states:
            raise InputError(
                f"{self.path}: damaged, {name} has the checksum {found}, expected {states}; {AGAIN}"
            )
        if tensor.is_floating_point() and tensor.numel():
            low, high = tensor.aminmax()  # NaN stays in both
            if not (low.isfinite() and high.isfinite()):
                token = int((~tensor.isfinite()).nonzero()[0, 0])
                kind = "NaN" if low.isnan() else "infinity"
                raise InputError(
                    f"{self.path}: {name}, predictor inputs of layer {name.split('.')[1]}, holds "
                    f"{kind} at token {token}; collect again, with --dtype bfloat16 or float32 if "
                    "the model overflows"
                )


def read_header(path: Path, want: str | None = None) -> Header:
    """Read a shard's header and check it against `want`, its file's name and size.

    Raises:
        InputError: See `ShardFile`.
    """
    try:
        check_file(path, WHAT)
    except InputError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise InputError(f"{error}; {AGAIN}") from error
        raise
    try:
        with path.open("rb") as file:
            size = fstat(file.fileno()).st_size
            raw = _raw_header(file, size)
    except OSError as error:
        raise unreadable_error(path, error, WHAT) from error
    except ValueError as error:
        raise InputError(f"{path}: damaged, {error}; {AGAIN}") from error
    found = xxhash.xxh3_128_hexdigest(raw)
    if want is not None and found != want:
        raise InputError(
            f"{path}: damaged or of another store, its header has the checksum {found}, but the "
            f"manifest says {want}; {AGAIN}"
        )
    try:
        fields, sums, says, end = _parsed(raw[8:])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: damaged header; {AGAIN}") from error
    if says != path.name:
        raise InputError(f"{path}: says that it is {shown(says)}; {AGAIN}")
    if size != len(raw) + end:
        raise InputError(
            f"{path}: has {size:,} bytes, expected {len(raw) + end:,}: it was cut short or added "
            f"to; {AGAIN}"
        )
    return Header(found, fields, sums)


def header_checksum(path: Path) -> str:
    """Return the checksum of a shard's header, which holds those of its data."""
    return read_header(path).checksum


def _raw_header(file: BinaryIO, nbytes: int) -> bytes:
    """Return length and text of the safetensors header of a file of `nbytes` bytes."""
    length = file.read(8)
    size = int.from_bytes(length, "little")
    if len(length) < 8 or size > min(nbytes - 8, 100_000_000):
        raise ValueError("it does not begin as a shard does")
    return length + file.read(size)


def _parsed(text: bytes) -> tuple[dict[str, Field], dict[str, str], str, int]:
    """Parse a header: fields by offset, checksums, the shard's name, and its data size.
    Damage raises one of Python's own errors."""
    table: dict[str, Any] = parse_json(text)
    metadata = table.pop("__metadata__")
    for row in table.values():
        if not all(is_count(item, least=0) for item in (*row["shape"], *row["data_offsets"])):
            raise ValueError("a shape or a place that is no count")
    rows = sorted(table.items(), key=lambda row: row[1]["data_offsets"])
    fields = {name: Field(name, _DTYPES[row["dtype"]], tuple(row["shape"])) for name, row in rows}
    sums = {name: str(metadata[name]) for name in fields}
    end = rows[-1][1]["data_offsets"][1] if rows else 0
    return fields, sums, shard_name(metadata["split"], int(metadata["number"])), end
