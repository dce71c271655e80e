"""Disk space: what a stage needs, what is free, and the message when a disk is full."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sparsecast.core.errors import InputError
from sparsecast.core.files import json_text, write_text

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a full disk, an exhausted quota, and a file size limit."""


def format_bytes(nbytes: float) -> str:
    """Format a number of bytes with three digits, such as 123 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 999.5:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:,.3g} TB" if nbytes < 999.5 else f"{nbytes:,.0f} TB"


def free_bytes(path: Path) -> int:
    """Return how many bytes can be written at `path`, which need not exist yet."""
    return shutil.disk_usage(nearest_folder(path)).free


def nearest_folder(path: Path) -> Path:
    """Return `path`, or the nearest of its parents that exists."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


def describe_space(path: Path, need: float) -> str:
    """State how much disk a stage needs and how much is free, for a message."""
    return f"{format_bytes(need)} of disk, {format_bytes(free_bytes(path))} are free there"


def check_disk_space(out: Path, need: int, what: str, instead: str = "") -> None:
    """Raise `InputError` if the disk cannot hold what a stage will write.

    Args:
        need: Bytes that are still to be written.
        what: Names them.
        instead: What else would help.
    """
    if need > (there := free_bytes(out)):
        raise InputError(
            f"{out}: {what} needs {format_bytes(need)}, but only {format_bytes(there)} are free "
            f"there; make room, choose another --out{instead}"
        )


@contextmanager
def explain_full_disk(out: Path, need: int, what: str, kept: Callable[[], str]) -> Iterator[None]:
    """Turn a full disk inside the block into an error that says what to do.

    Args:
        need: Bytes that `what` takes in total.
        kept: Called when the disk is full: clean up and say what is kept and how to go on.
    """
    try:
        yield
    except Exception as error:
        if full_disk_errno(error) is None:
            raise
        raise full_disk_error(error, out, need, what, kept()) from error


def write_result(path: Path, values: Any) -> None:
    """Write the file of --json, when the screen has shown what it will hold.

    Raises:
        OSError: It cannot be written; a full disk is told with what the file takes.
    """
    text = json_text(values)
    left = "the result is on the screen: make room and run the same command again"
    with explain_full_disk(path, len(text.encode()), "the result", lambda: left):
        write_text(path, text)


def full_disk_error(error: BaseException, out: Path, need: float, what: str, left: str) -> OSError:
    """Build the error of `explain_full_disk` from an `error` that `full_disk_errno` recognizes."""
    name = getattr(error, "filename", None)
    file = f"{Path(name).name}: " if isinstance(name, str) else ""
    reason = os.strerror(full_disk_errno(error) or 0)
    return OSError(
        f"{out}: cannot be written ({file}{reason}); {what} needs {describe_space(out, need)} now; "
        f"{left}"
    )


def full_disk_errno(error: BaseException) -> int | None:
    """Return the errno of a full disk, quota or file size limit, or None for other errors.

    torch, safetensors and tokenizers wrap it in errors of their own.
    """
    seen: BaseException | None = error
    while seen is not None:
        code = seen.errno if isinstance(seen, OSError) else None
        in_rust = isinstance(seen, SafetensorError) or type(seen) is Exception  # of tokenizers
        if in_rust and (found := re.search(r"os error (\d+)", str(seen))):
            code = int(found[1])
        if code in FULL:
            return code
        seen = seen.__cause__ or seen.__context__
    return None
