"""Broken activation stores: damaged as they are, or by somebody who makes the checksums fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import xxhash
from broken.bytes_faults import KINDS, appended, content, cut, flipped, in_folder, linked, put
from broken.json_faults import (
    DIGITS,
    HOSTILE,
    LONG,
    brief,
    fields,
    nested,
    no_object,
    twice,
    without,
)
from broken.runner import Case, Damage

MANIFEST, STATS = "manifest.json", "stats.safetensors"
SHARD = "train-00000.safetensors"
SPLITS = ("train", "calibration", "held-out")


def resealed(damage: Damage) -> Damage:
    """Damage after which every checksum fits again."""

    def both(folder: Path) -> None:
        damage(folder)
        value = json.loads((folder / MANIFEST).read_text())
        sums = value.get("checksums")
        if isinstance(sums, dict):
            for path in folder.glob("*.safetensors"):
                raw = path.read_bytes()
                end = len(raw) if path.name == STATS else 8 + int.from_bytes(raw[:8], "little")
                sums[path.name] = xxhash.xxh3_128_hexdigest(raw[:end])
            sums.pop(MANIFEST, None)
            own = xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())
            sums[MANIFEST] = own
        (folder / MANIFEST).write_text(json.dumps(value))

    return both


def header(change: Callable[[dict[str, Any]], object], name: str = SHARD) -> Damage:
    """Damage that changes a shard's header in place."""

    def damage(folder: Path) -> None:
        raw = (folder / name).read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        value = json.loads(raw[8:end])
        change(value)
        text = json.dumps(value).encode()
        (folder / name).write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])

    return damage


def entry(tensor: str, **values: Any) -> Damage:
    return header(lambda table: table[tensor].update(values))


def metadata(**values: Any) -> Damage:
    return header(lambda table: table["__metadata__"].update(values))


def values(tensor: str, new: torch.Tensor, *, checked: bool = True) -> Damage:
    """Damage that overwrites the beginning of a tensor, with a checksum that fits."""

    def damage(folder: Path) -> None:
        path = folder / SHARD
        raw = bytearray(path.read_bytes())
        end = 8 + int.from_bytes(raw[:8], "little")
        table = json.loads(raw[8:end])
        first, last = (end + at for at in table[tensor]["data_offsets"])
        data = new.contiguous().view(torch.uint8).numpy().tobytes()
        raw[first : first + len(data)] = data
        path.write_bytes(raw)
        own = xxhash.xxh3_128_hexdigest(bytes(raw[first:last]))
        if checked:
            metadata(**{tensor: own})(folder)

    return damage


def length(size: int, name: str = SHARD) -> Damage:
    """Damage to the length of a safetensors header."""
    return put(0, size.to_bytes(8, "little"), name)


def _moved(folder: Path) -> None:
    (folder / SHARD).rename(folder / "other")
    (folder / "held-out-00000.safetensors").rename(folder / SHARD)
    (folder / "other").rename(folder / "held-out-00000.safetensors")


SEALED_FIELDS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("model", "fingerprint", "corpus"), (None, 1, [], {})),
    **dict.fromkeys(("hidden_size", "ffn_width"), (0, -1, 1.5, True, "16", 2**63, DIGITS)),
    "threads": (0, -1, None),
    "ffn_matrices": (1, 4, "3"),
    "layers": ([], [-1], [0, 0], [1, 0], "0", {"0": 1}, [0.0], [2**63], list(range(1, 1_000))),
    "activation_threshold": (None, "0", True, [], DIGITS),
    "x_dtype": ("float8", "", None, [], "../float16", LONG),
    "energy": (None, 1, True, "no"),
    "experts": (-1, 1.5, "2", 2, 2**40),
    "experts_per_token": (1, 2**40),
    "config": (None, [], nested(60), {"a": nested(60)}),
    "options": (None, [], {"a": nested(60)}),
    "checksums": (None, []),
    "documents": (None, [], {"train": -1}, {"train": "1"}),
    "truncated": (None, {"train": 1.5}),
    "skipped": (-1, "0", 2.5),
    "shard_tokens": (
        None,
        [],
        {},
        {"train": [8]},
        {s: [] for s in SPLITS},
        {s: [0] for s in SPLITS},
        {s: [-8] for s in SPLITS},
        {s: [2**63] for s in SPLITS},
        {s: [8, 8] for s in SPLITS},
        {**{s: [8] for s in SPLITS}, "../../etc": [8]},
        {s: ["8"] for s in SPLITS},
        {s: [DIGITS] for s in SPLITS},
    ),
    "format_version": (None, "3", 0, -1, 2, 4, 2**70, DIGITS, True, LONG, HOSTILE, [3]),
}
"""Values that no collection writes, by the manifest's field."""


CASES = [
    *no_object(MANIFEST),
    *(
        Case(f"{name}: {kind}", in_folder(damage, name), only=name)
        for name in (SHARD, STATS)
        for kind, damage in KINDS.items()
    ),
    *(
        Case(f"{name}: cut at {share:.0%}", cut(share, name), only=name)
        for name in (SHARD, STATS)
        for share in (0.01, 0.2, 0.5, 0.9, 0.999)
    ),
    *(
        Case(f"{name}: bytes behind the end", appended(b"x", name), only=name)
        for name in (SHARD, STATS)
    ),
    *(
        Case(f"{name}: a bit at {at}", flipped(at, bit, name), only=name)
        for name in (SHARD, STATS)
        for at, bit in ((0, 0), (7, 7), (9, 1), (40, 2), (-1, 7), (-33, 0))
    ),
    *(
        Case(f"{name}: a header of {size:,} bytes", length(size, name), only=name)
        for name in (SHARD, STATS)
        for size in (0, 1, 2, 99_999_999, 2**31, 2**63, 2**64 - 1)
    ),
    Case("a shard in another's place", _moved, only=SHARD),
    Case("a link to a shard", linked(SHARD), "the file is whole"),
    Case("an edited manifest", fields(MANIFEST, {"corpus": "another"}), only=MANIFEST),
    Case("a field twice", twice(MANIFEST, "hidden_size", 17), only=MANIFEST),
    Case("a field twice, alike", twice(MANIFEST, "hidden_size", 16), "the last one counts"),
    Case("no checksums", fields(MANIFEST, {"checksums": {}}), only=MANIFEST),
    Case("a checksum that is a number", fields(MANIFEST, {"checksums": {SHARD: 1}}), only=MANIFEST),
    Case(
        "a checksum that is long", fields(MANIFEST, {"checksums": {MANIFEST: LONG}}), only=MANIFEST
    ),
    Case(
        "a checksum of another file",
        fields(MANIFEST, {"checksums": {"../x": "0" * 32}}),
        only=MANIFEST,
    ),
    Case("a field less", without(MANIFEST, "layers"), only=MANIFEST),
    Case("an unknown field", fields(MANIFEST, {LONG: 1}), only=MANIFEST),
    Case("an unknown field with an escape", fields(MANIFEST, {HOSTILE: 1}), only=MANIFEST),
    *(
        Case(f"sealed: {name} {brief(value)}", resealed(fields(MANIFEST, {name: value})))
        for name, several in SEALED_FIELDS.items()
        for value in several
    ),
    Case(
        "sealed: a model with an escape",
        resealed(fields(MANIFEST, {"model": HOSTILE})),
        "a name like any other, shown escaped",
    ),
    Case("sealed: a long name", resealed(fields(MANIFEST, {"corpus": LONG})), only=MANIFEST),
    *(
        Case(
            f"sealed: a shard without {key}",
            resealed(header(lambda t, key=key: t.pop(key))),
            only=SHARD,
        )
        for key in ("__metadata__", "id", "layer.0.mask", "layer.0.x")
    ),
    *(
        Case(
            f"sealed: a shard whose {key} is {brief(value)}",
            resealed(metadata(**{key: value})),
            only=SHARD,
        )
        for key, value in (
            ("split", "held-out"),
            ("split", "../train"),
            ("split", None),
            ("split", HOSTILE),
            ("split", LONG),
            ("number", "1"),
            ("number", "x"),
            ("number", "9" * 5000),
            ("number", None),
            ("number", [1]),
            ("id", "0" * 32),
            ("id", None),
        )
    ),
    *(
        Case(
            f"sealed: {key} of {tensor} is {brief(value)}",
            resealed(entry(tensor, **{key: value})),
            only=SHARD,
        )
        for tensor, key, value in (
            ("id", "dtype", "F32"),
            ("id", "dtype", "F8"),
            ("id", "dtype", None),
            ("id", "dtype", []),
            ("id", "shape", [9]),
            ("id", "shape", [-8]),
            ("id", "shape", [2**63]),
            ("id", "shape", []),
            ("id", "shape", "8"),
            ("id", "shape", None),
            ("id", "shape", [8, 1]),
            ("id", "shape", ["8"]),
            ("id", "shape", [8.0]),
            ("layer.0.mask", "data_offsets", [0, 24]),
            ("layer.0.mask", "data_offsets", [-24, 0]),
            ("layer.0.mask", "data_offsets", [0, 2**63]),
            ("layer.0.mask", "data_offsets", [0]),
            ("layer.0.mask", "data_offsets", []),
            ("layer.0.mask", "data_offsets", None),
            ("layer.0.mask", "data_offsets", [10**6, "x"]),
            ("layer.0.mask", "data_offsets", [10**6, None]),
            ("layer.0.mask", "data_offsets", [10**6, 1.5]),
            ("layer.0.mask", "data_offsets", ["a", "b"]),
        )
    ),
    Case(
        "sealed: a tensor too many",
        resealed(
            header(
                lambda t: t.update(
                    {HOSTILE[:4]: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}
                )
            )
        ),
        only=SHARD,
    ),
    Case(
        "sealed: a header of nested lists",
        resealed(content((2 * 10**5).to_bytes(8, "little") + b"[" * 10**5 + b"]" * 10**5, SHARD)),
        only=SHARD,
    ),
    Case(
        "sealed: inputs with NaN",
        resealed(values("layer.0.x", torch.tensor([float("nan")]).half())),
        only=SHARD,
    ),
    Case(
        "sealed: inputs with infinity",
        resealed(values("layer.0.x", torch.tensor([float("inf")]).half())),
        only=SHARD,
    ),
    Case(
        "sealed: negative ids",
        resealed(values("id", torch.tensor([-1, 2**31 - 1]).int())),
        "training reads inputs and masks; ids are shown nowhere",
    ),
    Case(
        "sealed: no statistics",
        resealed(content((2).to_bytes(8, "little") + b"{}", STATS)),
        only=STATS,
    ),
]
