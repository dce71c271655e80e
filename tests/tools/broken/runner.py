"""Call a reader on broken input, within five seconds and one gigabyte, and judge its answer."""

from __future__ import annotations

import faulthandler
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from sparsecast.cli.main import main
from sparsecast.core.errors import InputError

SECONDS = 5.0
MEMORY = 2**30
"""Bytes of address space that reading a small file may add."""
FENCE = 2 * MEMORY
"""Where the process's address space ends meanwhile; an allocation between the two is counted."""
CLAIM = 3 * 2**29
"""Bytes that a file claims to hold: above `MEMORY`, below `FENCE`."""
LONGEST = 400
"""Characters of a message, the path to the input not counted."""

Damage = Callable[[Path], object]
Reader = Callable[[Path], object]


@dataclass(frozen=True)
class Case:
    """One broken input."""

    name: str
    damage: Damage
    """Breaks the sound input at the path."""
    harmless: str = ""
    """Why the reader gives a correct answer all the same; empty: it has to refuse."""
    only: str = ""
    """A file's name that the message has to hold."""
    longest: int = LONGEST
    """Characters of its message."""

    def __str__(self) -> str:
        return self.name


def refused(read: Reader, path: Path) -> str | None:
    """Return the text of a reader's InputError; None if it reads.

    Any other exception, a hang, and memory that nothing in the file stands for fail the test.
    """
    try:
        with bounded():
            read(path)
    except InputError as error:
        return str(error)
    except AssertionError:
        raise
    except BaseException as error:  # a panic in Rust is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        raise AssertionError(f"{type(error).__name__} instead of InputError: {error}") from error
    return None


def judge(case: Case, read: Reader, path: Path) -> None:
    """Break a sound input, read it, and check the answer."""
    case.damage(path)
    told = refused(read, path)
    if case.harmless:
        assert told is None, f"harmless, but refused: {told}"
        return
    assert told is not None, "read as if it were whole"
    assert_message(told, path, case.only, case.longest)


def assert_message(told: str, path: Path, only: str = "", longest: int = LONGEST) -> None:
    """Check a message: one printable line of a sensible length, which names the input."""
    assert told.isprintable(), f"control characters in {told!r}"
    assert str(path) in told or (only and only in told), f"does not name {path}: {told}"
    assert only in told, f"does not name {only}: {told}"
    short = told.replace(str(path), "")
    assert len(short) <= longest, f"{len(short)} characters: {told}"


def command(*words: str) -> Callable[[Path], None]:
    """Make a reader of a command line, in which {} stands for the input.

    Exit code 2 is an InputError again; exit code 1 with what the command found wrong is one too.
    """

    def run(path: Path) -> None:
        out, err = StringIO(), StringIO()
        code: object = 0
        with redirect_stdout(out), redirect_stderr(err):
            try:
                main([word.format(path) for word in words])
            except SystemExit as done:
                code = done.code
        told = err.getvalue()
        if code == 2:
            line, end = told.removeprefix("sparsecast: "), told.count("\n")
            assert end == 1, f"{end} lines: {told}"
            raise InputError(line.rstrip("\n"))
        assert code in (0, None), f"exit code {code}: {told}"

    return run


@contextmanager
def bounded() -> Iterator[None]:
    """Bound time and address space."""
    late = []

    def ring(*_: object) -> None:
        late.append(time.monotonic())
        raise TimeoutError(f"still reading after {SECONDS} s")

    size, peak = _memory("VmSize"), _memory("VmPeak")
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, ring)
    resource.setrlimit(resource.RLIMIT_AS, (size + FENCE, before[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    faulthandler.dump_traceback_later(4 * SECONDS, exit=True)  # blocked outside of Python
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGALRM, handler)
        grown = _memory("VmPeak") - peak
        assert not late, f"still reading after {SECONDS} s"
        assert grown <= MEMORY, f"took {grown:,} bytes"


def _memory(name: str) -> int:
    """Read a size of this process in bytes."""
    with open("/proc/self/status", encoding="ascii") as file:
        line = next(line for line in file if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
