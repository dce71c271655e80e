"""Find the local files of a corpus, and refuse files that cannot be read.

A file or folder that is there and may not be read is an error, never left out: what was recorded
would not be what the user has named.
"""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from sparsecast.core.errors import InputError
from sparsecast.core.files import check_file, unreadable_error
from sparsecast.core.folders import check_folder_kind

SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
_FILE = f"a file of text ({', '.join(SUFFIXES)})"
_OPENED = ("/dev/stdin", "/dev/fd/", "/proc/self/fd/")
"""Where what a shell has opened for a process has a name."""


def is_stream(spec: str) -> bool:
    """Return whether a corpus can be read only once: standard input, `<(command)`, a FIFO."""
    if spec == "-":
        return True
    try:
        mode = Path(spec).expanduser().stat().st_mode
    except OSError:
        return False
    opened = spec.startswith(_OPENED) and not stat.S_ISDIR(mode)
    return opened or stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


def local_files(spec: str) -> list[Path] | None:
    """Return the files of a path or pattern, in order; None if it may be a dataset's name.

    Raises:
        InputError: No file is there, a file is not regular, or a file or a folder cannot be
            read.
    """
    path = Path(spec).expanduser()
    pattern = any(c in spec for c in "*?[")
    mode = _mode(path) if not pattern or os.path.exists(path) else None
    if mode is not None and stat.S_ISDIR(mode):
        files = sorted(_below(path))
        if not files:
            check_folder_kind(path, "text")
            raise InputError(f"{spec}: no {', '.join(SUFFIXES)} file in this folder")
    elif mode is not None:
        files = [path]
    elif pattern:
        files = _matching(str(path))
        if not files:
            raise InputError(f"{spec}: no file matches this pattern")
    elif path.suffix.lower() in SUFFIXES or spec.startswith(("/", ".", "~")) or path.drive:
        raise InputError(f"{spec}: no such file or folder; check the path of the corpus")
    else:
        return None
    for file in files:
        check_file(file, _FILE)
        if file.suffix.lower() not in SUFFIXES:
            raise InputError(f"{file}: cannot read this type; expected {', '.join(SUFFIXES)}")
    return files


def max_tokens(spec: str, seq_len: int) -> int | None:
    """Return an upper bound of a corpus's tokens from its bytes; None if that is unknown.

    Every token stands for at least one byte, and a document or a turn of a chat adds fewer tokens
    than the bytes of its JSON or its line end. Every further window of a document adds a BOS.
    """
    files = None if spec == "builtin" or is_stream(spec) else local_files(spec)
    if files is None or any(file.suffix.lower() == ".parquet" for file in files):
        return None
    most = len(files) + sum(file.stat().st_size for file in files)
    return most + most // (seq_len - 1)


def _mode(path: Path) -> int | None:
    """Return a path's file type and permissions; None if it does not exist."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise unreadable_error(path, error, "the corpus") from error


def _below(folder: Path) -> Iterator[Path]:
    for where, _, names in os.walk(folder, onerror=_refuse):
        yield from (Path(where, n) for n in names if Path(n).suffix.lower() in SUFFIXES)


def _matching(pattern: str) -> list[Path]:
    """Return each file once, however links lead to it; `glob` skips unreadable folders."""
    head, *rest = Path(pattern).parts
    for depth in range(len(rest)):
        for found in glob.iglob(str(Path(head, *rest[:depth])), recursive=True):
            try:
                if os.path.isdir(found):
                    os.scandir(found).close()
            except OSError as error:
                _refuse(error)
    matches = {Path(os.path.realpath(p)) for p in glob.iglob(pattern, recursive=True)}
    return sorted(p for p in matches if not p.is_dir())


def _refuse(error: OSError) -> None:
    raise unreadable_error(Path(error.filename), error, "a folder of the corpus") from error
