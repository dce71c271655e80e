"""A lock that lets one run at a time write a folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from sparsecast.core.errors import InputError
from sparsecast.core.files import hidden_sibling


@contextmanager
def lock_folder(out: Path, work: str) -> Iterator[None]:
    """Keep a second run out of the same folder; `work` names its kind.

    The operating system's lock on a hidden file beside the folder ends with the process, also if
    that is killed, so a file left behind blocks nobody.

    Raises:
        InputError: Another run holds it, or no file can be written there.
    """
    path = hidden_sibling(out, "lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        seen = path.stat().st_ino
        lock = FileLock(path, timeout=0)
        lock.acquire()
        if not path.exists() or path.stat().st_ino != seen:
            lock.release()  # the file was removed by its holder, or replaced
            raise Timeout(str(path))
    except Timeout as error:
        raise InputError(
            f"{out}: another {work} is writing it; wait for that one, or choose another --out"
        ) from error
    except OSError as error:
        raise InputError(
            f"{out}: cannot be written ({error.strerror or error}); choose another --out"
        ) from error
    try:
        yield
    finally:
        with suppress(PermissionError):  # Windows removes no file that is open
            path.unlink(missing_ok=True)
        lock.release()


def clear_lock(out: Path) -> None:
    """Remove the file of a run that was killed between finishing `out` and the end of its lock."""
    if hidden_sibling(out, "lock").is_file():
        with suppress(InputError), lock_folder(out, "run"):
            pass
