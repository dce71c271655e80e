"""Broken predictor folders, with a manifest and without."""

from __future__ import annotations

import json
import shutil
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
import xxhash
from broken import pickles
from broken.bytes_faults import KINDS, appended, content, cut, flipped, in_folder, linked
from broken.json_faults import (
    DIGITS,
    HOSTILE,
    LONG,
    brief,
    edited,
    fields,
    nested,
    no_object,
    twice,
    without,
)
from broken.runner import Case, Damage
from broken.store import MANIFEST

FILE, CONFIG = "model_0.pt", "config.json"


def sealed(damage: Damage) -> Damage:
    """Damage after which every checksum fits again."""

    def both(folder: Path) -> None:
        damage(folder)

        def seal(value: Any) -> None:
            if not isinstance(value.get("checksums"), dict):
                return
            for path in folder.glob("*"):
                if path.name in value["checksums"] and path.name != MANIFEST:
                    value["checksums"][path.name] = xxhash.xxh3_128_hexdigest(path.read_bytes())
            value["checksums"].pop(MANIFEST, None)
            text = json.dumps(value, sort_keys=True).encode()
            value["checksums"][MANIFEST] = xxhash.xxh3_128_hexdigest(text)

        edited(MANIFEST, seal)(folder)

    return both


def bare(damage: Damage) -> Damage:
    """Damage to a folder of another tool, without a manifest."""

    def both(folder: Path) -> None:
        (folder / MANIFEST).unlink()
        damage(folder)

    return both


def holds(data: bytes) -> Damage:
    return bare(content(data, FILE))


def _value(value: Any, *, legacy: bool = False) -> Damage:
    def damage(folder: Path) -> None:
        with warnings.catch_warnings(action="ignore"):
            (folder / FILE).write_bytes(pickles.saved(value, legacy=legacy))

    return bare(damage)


def _pair(fc1: Any = None, fc2: Any = None, **more: Any) -> dict[str, Any]:
    def matrix(value: Any) -> Any:
        return torch.ones(4, 4) if value is None else value

    return {"fc1.weight": matrix(fc1), "fc2.weight": matrix(fc2), **more}


def _copied(name: str) -> Damage:
    return lambda folder: shutil.copy(folder / FILE, folder / name)


SEALED_FIELDS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("model", "fingerprint", "convention"), (None, 1, [], LONG)),
    "activation": (None, "silu", [], LONG),
    "activation_threshold": (None, "0", -1, 1e39, DIGITS, 1e-60),
    **dict.fromkeys(("hidden_size", "ffn_width"), (0, -8, 9, 8.0, "8", 2**63, DIGITS)),
    "ffn_matrices": (0, "3", None),
    "dtypes": ([], None, ["f16"], ["f16", "f64"], ["f16", None], "f16", {"0": "f16"}, ["f16"] * 3),
    "ranks": ([], [4], [4, 5], [4, -4], [4, "4"], [4, DIGITS], None),
    "calibration": ([], [{}, {}], [{"recall": 2, "predicted_sparsity": 0}] * 2, None, [1, 2]),
    "experts": (-1, "1", 3, 2, 2**40),
    "recipe": (None, [], nested(60), {"a": nested(60)}),
    "checksums": (None, []),
    "format_version": (None, 2, 4, "3", DIGITS, LONG, HOSTILE),
}
"""Values that no training writes, by the manifest's field."""
THRESHOLDS = ("1", None, [], {}, True, 1e39, -1e39, 1e-60, DIGITS, LONG)

CASES = [
    *no_object(MANIFEST, without=("gone",)),
    *no_object(CONFIG),
    *(
        Case(f"{FILE}: {kind}", in_folder(damage, FILE), only=FILE)
        for kind, damage in KINDS.items()
    ),
    *(
        Case(f"{FILE}: cut at {share:.0%}", cut(share, FILE), only=FILE)
        for share in (0.01, 0.3, 0.7, 0.99)
    ),
    *(
        Case(f"{FILE}: a bit at {at}", flipped(at, name=FILE), only=FILE)
        for at in (0, 30, 200, 700, -1)
    ),
    *(
        Case(f"without a manifest: {FILE} {kind}", bare(in_folder(damage, FILE)))
        for kind, damage in KINDS.items()
    ),
    *(
        Case(f"without a manifest: {FILE} cut at {share:.0%}", bare(cut(share, FILE)), only=FILE)
        for share in (0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99)
    ),
    Case(
        "without a manifest: bytes behind the end",
        bare(appended(b"x" * 99, FILE)),
        "a zip's table is found from its end",
    ),
    Case("without a manifest: a link to a file", bare(linked(FILE)), "the file is whole"),
    Case(
        "without a manifest: no config",
        bare(lambda folder: (folder / CONFIG).unlink()),
        "the threshold is 0 then, as in PowerInfer",
    ),
    Case(
        "a bit of a weight without a manifest",
        bare(lambda folder: _flip_weight(folder)),
        "no checksum tells",
    ),
    Case("a file too many", _copied("model_2.pt")),
    Case("a file of the past", _copied("model_00.pt"), "no name of a layer"),
    Case("a layer less", lambda folder: (folder / "model_1.pt").unlink()),
    Case(
        "layers exchanged",
        lambda folder: (
            (folder / "model_1.pt").rename(folder / "x"),
            (folder / FILE).rename(folder / "model_1.pt"),
            (folder / "x").rename(folder / FILE),
        ),
        only=FILE,
    ),
    Case("an edited manifest", fields(MANIFEST, {"model": "another"}), only=MANIFEST),
    Case("a field less", without(MANIFEST, "ranks"), only=MANIFEST),
    Case("a field twice", twice(MANIFEST, "hidden_size", 9), only=MANIFEST),
    Case("an unknown field", fields(MANIFEST, {LONG: 1}), only=MANIFEST),
    Case("an unknown field with an escape", fields(MANIFEST, {HOSTILE: 1}), only=MANIFEST),
    Case("no checksums", fields(MANIFEST, {"checksums": {}}), only=MANIFEST),
    Case(
        "a checksum that is long", fields(MANIFEST, {"checksums": {MANIFEST: LONG}}), only=MANIFEST
    ),
    *(
        Case(f"sealed: {name} {brief(value)}", sealed(fields(MANIFEST, {name: value})))
        for name, several in SEALED_FIELDS.items()
        for value in several
    ),
    Case(
        "sealed: a model with an escape",
        sealed(fields(MANIFEST, {"model": HOSTILE})),
        "a name like any other, shown escaped",
    ),
    *(
        Case(
            f"a threshold {brief(value)}",
            bare(fields(CONFIG, {"sparse_threshold": value})),
            only=CONFIG,
        )
        for value in THRESHOLDS
    ),
    *(
        Case(f"a pickle that would run {what}", holds(pickles.zipped(data)), only=FILE)
        for what, data in pickles.RUNS.items()
    ),
    *(
        Case(f"a bare pickle that would run {what}", holds(data), only=FILE)
        for what, data in pickles.RUNS.items()
    ),
    *(
        Case(f"a pickle that claims {what}", holds(pickles.zipped(data)), only=FILE)
        for what, data in pickles.CLAIMS.items()
    ),
    *(
        Case(f"a bare pickle that claims {what}", holds(data), only=FILE)
        for what, data in pickles.CLAIMS.items()
    ),
    *(
        Case(f"a pickle with {what}", holds(pickles.zipped(data)), only=FILE)
        for what, data in pickles.MALFORMED.items()
    ),
    Case(
        "a compressed file that unpacks to much",
        lambda folder: holds(pickles.bomb())(folder),
        only=FILE,
    ),
    Case("a zip that goes on in another file", holds(pickles.split_zip()), only=FILE),
    Case(
        "a compressed file",
        holds(
            pickles.zipped(pickles.weights(pickles.rebuilt((4, 4), (4, 1))), zipfile.ZIP_DEFLATED)
        ),
        only=FILE,
    ),
    Case("the format before torch 1.6 that claims much", holds(pickles.legacy_claim()), only=FILE),
    Case("the format before torch 1.6", _value(_pair(), legacy=True), "torch reads it"),
    Case(
        "as the zip of other hands",
        holds(pickles.zipped(pickles.weights(pickles.rebuilt((4, 4), (4, 1))))),
        "torch reads it",
    ),
    *(
        Case(f"a tensor {what}", holds(pickles.zipped(pickles.weights(tensor))), only=FILE)
        for what, tensor in {
            "beyond its storage": pickles.rebuilt((4, 5), (5, 1)),
            "that begins beyond its storage": pickles.rebuilt((4, 4), (4, 1), 2**40),
            "that begins before its storage": pickles.rebuilt((4, 4), (4, 1), -1),
            "of negative strides": pickles.rebuilt((4, 4), (-4, 1)),
            "of negative sizes": pickles.rebuilt((-4, 4), (4, 1)),
            "of 2**62 rows that are one": pickles.rebuilt((2**62, 4), (0, 1)),
            "of a storage that is not there": pickles.rebuilt((4, 4), (4, 1), key="9"),
            "of a storage that leaves the archive": pickles.rebuilt((4, 4), (4, 1), key="../../0"),
            "of a storage larger than its file": pickles.rebuilt((4, 4), (4, 1), stored=2**40),
        }.items()
    ),
    *(
        Case(f"a matrix that is {what}", _value(_pair(tensor)), only=FILE)
        for what, tensor in pickles.odd_tensors().items()
    ),
    *(
        Case(f"a file that holds {what}", _value(value), only=FILE)
        for what, value in {
            "nothing": {},
            "a list": [1],
            "a tensor": torch.ones(4, 4),
            "a number": 1,
            "None": None,
            "a matrix less": {"fc1.weight": torch.ones(4, 4)},
            "a matrix more": _pair(bias=torch.ones(4)),
            "numbers for names": {1: torch.ones(4, 4), 2: torch.ones(4, 4)},
            "a long name": _pair(**{LONG: 1}),
            "a name with an escape": _pair(**{HOSTILE[:4]: 1}),
            "texts": _pair("a", "b"),
            "matrices that do not fit": _pair(torch.ones(3, 4)),
            "other tensors": _pair(torch.ones(4, 4), [1]),
        }.items()
    ),
]


def _flip_weight(folder: Path) -> None:
    raw = bytearray((folder / FILE).read_bytes())
    with zipfile.ZipFile(folder / FILE) as archive:
        member = next(m for m in archive.infolist() if m.filename.endswith("data/0"))
    raw[member.header_offset + 30 + len(member.filename) + 200] ^= 1
    (folder / FILE).write_bytes(raw)
