"""Room on a disk: what a stage needs, what is free, and what is said when it runs out."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sparsecast.collect.errors import InputError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No room left: of the disk, of the user's quota, or for one file."""


def size(nbytes: float) -> str:
    """In words, with three digits: 123 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 999.5:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:,.3g} TB" if nbytes < 999.5 else f"{nbytes:,.0f} TB"


def free(path: Path) -> int:
    """Bytes that may be written where `path` is or will be."""
    there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    return shutil.disk_usage(there).free


def check_room(out: Path, need: int, what: str, instead: str = "") -> None:
    """Raises `InputError` where the disk cannot hold what a stage will write.

    Args:
        need: Bytes that are still to be written.
        what: Names them.
        instead: What else would help.
    """
    if need > (there := free(out)):
        raise InputError(
            f"{out}: {what} needs {size(need)}, but only {size(there)} are free there; "
            f"make room, choose another --out{instead}"
        )


@contextmanager
def told_when_full(out: Path, need: int, what: str, kept: Callable[[], str]) -> Iterator[None]:
    """Where a disk fills up all the same: the folder, what it needs, what is free, and what next.

    Args:
        need: Bytes that `what` takes altogether.
        kept: Called then; clears up, and says what is kept and how to go on.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise full_disk(error, out, need, what, kept()) from error


def full_disk(error: OSError, out: Path, need: int, what: str, left: str) -> OSError:
    """What `told_when_full` says; of any other fault of a disk the file, and what is `left`."""
    if error.errno not in FULL:
        return OSError(f"{error.filename or out}: {error.strerror or error}; {left}")
    file = f": {Path(error.filename).name}" if isinstance(error.filename, str) else ""
    return OSError(
        f"{out}: cannot be written ({error.strerror}{file}); {what} needs {size(need)} of disk, "
        f"{size(free(out))} are free there now; {left}"
    )


def save_tensors(path: Path, value: Any) -> None:
    """`torch.save`, which says no more of a full disk than that positions differ.

    Raises:
        OSError: In the system's words, with the file's name; no half of it stays.
    """
    try:
        with path.open("wb") as file:
            torch.save(value, file)
    except (RuntimeError, OSError) as error:
        path.unlink(missing_ok=True)
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause is None:
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from error
