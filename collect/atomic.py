"""Outputs appear under their final name whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any

from sparsecast.collect.errors import InputError


def check_new(
    path: Path, *, replaces: str | None = None, beside: tuple[str, ...] | None = None
) -> Path:
    """The folder that `new_folder` would make, refused where that would; before long work."""
    path = Path(os.path.realpath(path))  # a link stays one, and "." has a name
    if not path.name or path.is_mount():
        raise InputError(f"{path}: cannot be replaced as a whole; choose a folder in it for --out")
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: is a file, expected a folder to write; choose another --out")
    if path.is_dir() and any(path.iterdir()):
        marks = [] if replaces is None else sorted(path.glob(replaces))
        known = {p for pattern in beside or ("*",) for p in path.glob(pattern)}
        more = len(marks) > 1 and beside is not None
        if not marks or more or not known.union(marks).issuperset(path.iterdir()):
            raise InputError(
                f"{path}: exists and holds other files, expected a new or empty folder; choose "
                "another --out or remove it"
            )
    return path


@contextmanager
def new_folder(
    path: Path, *, replaces: str | None = None, beside: tuple[str, ...] | None = None
) -> Iterator[Path]:
    """Fill a hidden sibling of `path` and move it there when the block ends without an error.

    Args:
        path: The folder to make. An empty one that exists is used.
        replaces: Glob that marks a folder of ours, which may be replaced; anything else that
            exists under `path` is refused.
        beside: Globs of what else such a folder may hold, with one file that marks it; unset:
            whatever is there goes with it.
    """
    path = check_new(path, replaces=replaces, beside=beside)
    part = path.with_name(f".{path.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error}); choose another --out") from error
    try:
        yield part
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a file in one step."""
    part = path.with_name(f".{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON in one step; NaN and infinity are refused, absent numbers are null."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def refuse_unwritable(path: Path, option: str) -> None:
    """An `InputError` before long work, where its result could not be written."""
    there = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or not there.is_dir() or not os.access(there, os.W_OK):
        raise InputError(f"{option}: {path} cannot be written; name a file in a folder of yours")


def read_bytes(path: Path, what: str) -> bytes:
    """A small file of a user's, whole.

    Raises:
        InputError: No such file, one that may not be read, or none of a file's kind: a folder, a
            device, or a FIFO, which would wait for somebody to write. Each is told apart.
    """
    check_file(path, what)
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable(path, error, what) from error


def check_file(path: Path, what: str) -> None:
    """Raises `InputError` unless `path` is a regular file, or a link to one, that can be read."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            path.open("rb").close()
            return
    except OSError as error:
        raise unreadable(path, error, what) from error
    raise InputError(f"{path}: is {_KINDS.get(stat.S_IFMT(mode), 'no file')}, expected {what}")


_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def unreadable(path: Path, error: OSError, what: str) -> InputError:
    """What to say of a file that could not be opened: missing is not the same as forbidden."""
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return InputError(f"{path}: no such file, expected {what}")
    if isinstance(error, PermissionError):
        return InputError(f"{path}: may not be read ({error.strerror}); expected {what}; chmod it")
    return InputError(f"{path}: cannot be read ({error.strerror or error}), expected {what}")


def parse_json(text: str | bytes) -> Any:
    """`json.loads` for files of a user's; every fault of theirs is a `ValueError`.

    NaN and Infinity are refused, which JSON has no words for, and numbers beyond float64, which
    Python reads as infinity. So is nesting beyond Python's stack.
    """
    try:
        return json.loads(text, parse_constant=_no_number, parse_float=_finite)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _finite(digits: str) -> float:
    if not isfinite(value := float(digits)):
        raise ValueError(f"{digits} is beyond the range of numbers")
    return value


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON object, by the rules of `parse_json`.

    Raises:
        InputError: Anything else, with the words for what the file should have been.
    """
    data = read_bytes(path, what)
    try:
        value = parse_json(data.decode("utf-8-sig"))
    except ValueError as error:
        raise InputError(f"{path}: is not JSON ({error}), expected {what}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object with {what}")
    return value
