"""Read and write files; outputs appear under their final name complete or not at all."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EACCES, EISDIR
from math import isfinite
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from sparsecast.core.errors import InputError


def check_new_folder(
    path: Path, *, replaces: str | None = None, beside: tuple[str, ...] | None = None
) -> Path:
    """Check before long work that `new_folder` can make a folder, and return its path."""
    path = Path(os.path.realpath(path))  # a link stays one, and "." has a name
    check_writable_folder(path)
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


def check_writable_folder(path: Path) -> None:
    """Check before long work that a folder can be created at `path`."""
    try:
        if path.is_symlink():
            raise InputError(f"{path}: links lead in a loop; remove it or choose another --out")
        if not path.name or os.path.ismount(path):
            raise InputError(
                f"{path}: cannot be replaced as a whole; choose a folder in it for --out"
            )
        if path.exists() and not path.is_dir():
            raise InputError(f"{path}: is a file, expected a folder to write; choose another --out")
        _try_to_write(path.parent)
        if path.is_dir() and any(path.iterdir()):
            _try_to_write(path)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror or error}); choose another --out"
        ) from error


def _try_to_write(folder: Path) -> None:
    """Raise `OSError` if no file can be created in a folder or its nearest existing parent.

    What permissions say is not enough: /proc and a disk mounted for reading refuse root too.
    """
    folder = folder.absolute()
    there = next(p for p in (folder, *folder.parents) if os.path.lexists(p))
    TemporaryFile(dir=there).close()


def hidden_sibling(path: Path, suffix: str) -> Path:
    """Return `.<name>.<suffix>` beside `path`: where an output lives until it is complete."""
    return path.with_name(f".{path.name}.{suffix}")


@contextmanager
def new_folder(
    path: Path, *, replaces: str | None = None, beside: tuple[str, ...] | None = None
) -> Iterator[Path]:
    """Fill a hidden sibling of `path` and move it there when the block ends without an error.

    Args:
        path: The folder to make. An empty one that exists is used.
        replaces: Glob of a file that marks a folder which may be replaced; any other existing
            folder is refused.
        beside: Globs of the other files that such a folder may hold. With None it may hold any,
            which are deleted with it.
    """
    path = check_new_folder(path, replaces=replaces, beside=beside)
    part, earlier = hidden_sibling(path, "part"), hidden_sibling(path, "earlier")
    try:
        if earlier.is_dir() and not path.exists():  # killed between two renames
            os.replace(earlier, path)
        shutil.rmtree(earlier, ignore_errors=True)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error}); choose another --out") from error
    try:
        yield part
        if path.is_dir():  # a folder that is removed file by file would be neither old nor new
            os.replace(path, earlier)
        try:
            os.replace(part, path)
        except OSError:
            if earlier.is_dir():
                os.replace(earlier, path)
            raise
        shutil.rmtree(earlier, ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a file atomically; write directly to /dev/stdout, a FIFO or a shell's >(command).

    Lines end in a line feed on every system. Lone surrogates, which a file's name may hold, are
    written as escapes.

    Raises:
        OSError: With the file's name.
    """
    try:
        if (opened := _opened(path)) is not None:
            with open(
                opened, "w", encoding="utf-8", errors="backslashreplace", newline="\n"
            ) as file:
                file.write(text)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        part = hidden_sibling(path, f"{os.getpid()}.part")
        try:
            part.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _opened(path: Path) -> int | Path | None:
    """Open a target that cannot be replaced: a process's descriptor, a device, or a FIFO.

    Opening a file by its descriptor's name would overwrite it from the beginning.
    """
    names = {"/dev/stdout": "1", "/dev/stderr": "2"}
    number = names.get(str(path), path.name)
    if str(path) in names or str(path.parent) in ("/dev/fd", "/proc/self/fd"):
        return os.dup(int(number)) if number.isdecimal() else None
    return path if path.exists() and not path.is_file() and not path.is_dir() else None


def json_text(value: Any) -> str:
    """Serialize to indented JSON; NaN and infinity are refused, absent numbers are null."""
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write `json_text` atomically."""
    write_text(path, json_text(value))


def check_writable_file(path: Path, option: str) -> None:
    """Check before long work that its result can be written."""
    try:
        if path.is_dir():
            raise IsADirectoryError(EISDIR, "is a folder")
        opened = _opened(path)
        if isinstance(opened, int):
            os.close(opened)
        elif opened is None:
            _try_to_write(path.parent)
        elif not os.access(path, os.W_OK):
            raise PermissionError(EACCES, os.strerror(EACCES))
    except OSError as error:
        raise InputError(
            f"{option}: {path} cannot be written ({error.strerror or error}); name a file in a "
            "folder of yours"
        ) from error


def read_bytes(path: Path, what: str) -> bytes:
    """Read a small file of the user's.

    Raises:
        InputError: The file is missing, forbidden, or not a regular file: a folder, a device, or a
            FIFO, which would block. The message says which.
    """
    check_file(path, what)
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable_error(path, error, what) from error


def check_file(path: Path, what: str) -> None:
    """Raise `InputError` unless `path` is a readable regular file or a link to one."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            path.open("rb").close()
            return
    except OSError as error:
        raise unreadable_error(path, error, what) from error
    raise InputError(f"{path}: is {_KINDS.get(stat.S_IFMT(mode), 'no file')}, expected {what}")


_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def unreadable_error(path: Path, error: OSError, what: str) -> InputError:
    """Build the error for a file that could not be opened: missing, forbidden or unreadable."""
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return InputError(f"{path}: no such file, expected {what}")
    if isinstance(error, PermissionError):
        return InputError(f"{path}: may not be read ({error.strerror}); expected {what}; chmod it")
    return InputError(f"{path}: cannot be read ({error.strerror or error}), expected {what}")


def parse_json(text: str | bytes) -> Any:
    """Parse JSON from a user's file; every fault in it is a `ValueError`.

    NaN and Infinity, which are not JSON, are refused, as are numbers beyond float64, which Python
    reads as infinity, and nesting too deep for Python's stack.
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
    """Read a file that holds a JSON object, by the rules of `parse_json`.

    Raises:
        InputError: The file holds anything else; `what` names what it should be.
    """
    data = read_bytes(path, what)
    try:
        value = parse_json(data.decode("utf-8-sig"))
    except ValueError as error:
        raise InputError(f"{path}: is not JSON ({error}), expected {what}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object with {what}")
    return value
