"""The format that both manifests share, of activations and of predictors: version, keys, checksum.

A manifest is a frozen dataclass whose field `checksums` gives the xxh3_128 of every file by name.
The entry of the manifest itself is the checksum of its fields without that entry. Checksums
detect accidents, not tampering: whoever edits a file can compute them again.

A field that was added without a new format version is `optional`: it is left out of the file where
it has its default, so that manifests without it stay valid, checksum included.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, field, fields, replace
from pathlib import Path
from sys import float_info
from typing import Any, TypeGuard

import xxhash

from sparsecast.core.errors import InputError
from sparsecast.core.files import read_json, write_json
from sparsecast.core.options import short_repr

MANIFEST = "manifest.json"
OPTIONAL = "optional"
LARGEST = 2**63 - 1
"""Maximum count in a field, which keeps sums and ratios of counts within float64."""
LONGEST = 4096
"""Maximum length of a text in a field, in characters: the longest path."""
DEEPEST = 50
"""Maximum nesting of lists and objects in a field, which keeps recursive code within its limits."""


def optional(default: Any) -> Any:
    """Declare a field of a manifest that the file leaves out where it has its default."""
    return field(default=default, metadata={OPTIONAL: True})


def write_manifest(folder: Path, manifest: Any) -> None:
    """Write a manifest with its own checksum."""
    sums = {**manifest.checksums, MANIFEST: manifest_checksum(manifest)}
    write_json(folder / MANIFEST, _value(replace(manifest, checksums=sums)))


def _value(manifest: Any) -> dict[str, Any]:
    """Return what the file of a manifest holds."""
    absent = {
        item.name
        for item in fields(manifest)
        if OPTIONAL in item.metadata and getattr(manifest, item.name) == item.default
    }
    return {name: value for name, value in asdict(manifest).items() if name not in absent}


def manifest_checksum(manifest: Any) -> str:
    """Return the xxh3_128 of a manifest's fields without its own checksum."""
    value = _value(manifest)
    value["checksums"].pop(MANIFEST, None)
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())


def stated_checksum(folder: Path) -> str | None:
    """Return the checksum that a folder's manifest states for itself, which covers every file
    through theirs; None without a manifest that states one.

    Raises:
        InputError: What is called manifest.json holds no JSON object.
    """
    if not os.path.lexists(folder / MANIFEST):
        return None
    sums = read_json(folder / MANIFEST, "the manifest of a folder of sparsecast").get("checksums")
    own = sums.get(MANIFEST) if isinstance(sums, dict) else None
    return own if isinstance(own, str) else None


def find_edit(path: Path, manifest: Any, again: str) -> str | None:
    """Describe an edit that a manifest's own checksum reveals; None if there is none."""
    states, found = manifest.checksums.get(MANIFEST, "none"), manifest_checksum(manifest)
    if states == found:
        return None
    return (
        f"{path}: damaged or edited, its checksum is {found}, but it was written with {states}; "
        f"{again}"
    )


def check_version(path: Path, value: dict[str, Any], ours: int, again: str) -> None:
    """Refuse a manifest of another format version, or without one.

    Args:
        again: How the folder is made anew.
    """
    version = value.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool):
        raise InputError(
            f"{path}: format_version is {short_repr(version)}, expected {ours}; it is damaged: "
            f"{again}"
        )
    if version > ours:
        raise InputError(
            f"{path}: format version {short_repr(version)}, but this sparsecast reads up to "
            f"{ours}: it was written by a newer one; upgrade sparsecast, or {again}"
        )
    if version < ours:
        raise InputError(
            f"{path}: format version {short_repr(version)} of an older sparsecast, expected "
            f"{ours}; {again}"
        )


def check_keys(path: Path, value: dict[str, Any], kind: type[Any], again: str) -> None:
    """Refuse a manifest of our version with other keys than the fields of the dataclass `kind`."""
    known = {item.name for item in fields(kind)}
    needed = {item.name for item in fields(kind) if OPTIONAL not in item.metadata}
    for odd, what in ((needed - set(value), "lacks"), (set(value) - known, "has an unknown")):
        if odd:
            raise InputError(f"{path}: damaged, it {what} {short_repr(min(odd))}; {again}")


def is_count(value: Any, least: int = 1) -> bool:
    """Return whether a JSON value is a whole number from `least` to `LARGEST`."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= LARGEST


def is_number(value: Any) -> bool:
    """Return whether a JSON value is a number within float64."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return -float_info.max <= value <= float_info.max


def is_text(value: Any) -> TypeGuard[str]:
    """Return whether a JSON value is a text of at most `LONGEST` characters."""
    return isinstance(value, str) and len(value) <= LONGEST


def is_checksums(value: Any) -> bool:
    """Return whether a JSON value gives checksums by the names of files."""
    return isinstance(value, dict) and all(
        isinstance(item, str) and _CHECKSUM.fullmatch(item) for item in value.values()
    )


_CHECKSUM = re.compile("[0-9a-f]{32}")


def is_shallow(value: Any, levels: int = DEEPEST) -> bool:
    """Return whether a JSON value is nested no deeper than `levels`."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(is_shallow(item, levels - 1) for item in inner)
