"""Room on a disk: what a stage needs, what is free, and what is said when it runs out."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from sparsecast.core.errors import InputError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No room left: of the disk, of the user's quota, or for one file."""


def size(nbytes: float) -> str:
    """A number of bytes as a person reads it, with three digits: 123 GB."""
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
    except Exception as error:
        if no_room(error) is None:
            raise
        raise full_disk(error, out, need, what, kept()) from error


def full_disk(error: BaseException, out: Path, need: float, what: str, left: str) -> OSError:
    """What `told_when_full` says; `error` is one that `no_room` knows."""
    name = getattr(error, "filename", None)
    file = f"{Path(name).name}: " if isinstance(name, str) else ""
    return OSError(
        f"{out}: cannot be written ({file}{os.strerror(no_room(error) or 0)}); {what} needs "
        f"{size(need)} of disk, {size(free(out))} are free there now; {left}"
    )


def no_room(error: BaseException) -> int | None:
    """The error number of a full disk, quota or file, or None.

    torch and safetensors wrap it in errors of their own.
    """
    seen: BaseException | None = error
    while seen is not None:
        code = seen.errno if isinstance(seen, OSError) else None
        if isinstance(seen, SafetensorError) and (found := re.search(r"os error (\d+)", str(seen))):
            code = int(found[1])
        if code in FULL:
            return code
        seen = seen.__cause__ or seen.__context__
    return None
