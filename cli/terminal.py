"""Write to stdout and stderr, also if they are closed, full, or missing."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TextIO


def print_output(text: str) -> None:
    """Write to standard output; end the program silently if its reader has gone.

    Characters that its encoding lacks are escaped.
    """
    try:
        encoding = sys.stdout.encoding or "utf-8"
        sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()
    except BrokenPipeError:
        _discard(sys.stdout)
        sys.exit(141)  # as a program that SIGPIPE ended
    except (OSError, AttributeError) as error:  # no stream at all is None
        reason = error.strerror if isinstance(error, OSError) else "it is closed"
        if isinstance(error, OSError):
            _discard(sys.stdout)
        sys.exit(print_error(f"standard output cannot be written ({reason})", 1))


def print_error(message: str, code: int) -> int:
    """Write one line to standard error and return the exit code."""
    place = f" rank {process_rank()}" if process_rank() else ""
    try:
        sys.stderr.write(f"sparsecast{place}: {message}\n")
        sys.stderr.flush()
    except OSError:
        _discard(sys.stderr)
    except AttributeError:
        pass
    return code


def process_rank() -> int:
    """Return this process's rank under torchrun; `distributed_context` checks the variables."""
    value = os.environ.get("RANK", "0")
    return int(value) if value.isdecimal() and len(value) < 10 else 0


def _discard(stream: TextIO) -> None:
    """Discard the stream's buffer, which Python would write again at exit."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
