"""What `sparsecast bench engine` needs of the machine: cores, disk and memory."""

from __future__ import annotations

from pathlib import Path

from sparsecast.core.disk import describe_space, format_bytes, free_bytes
from sparsecast.core.errors import InputError
from sparsecast.core.machine import total_memory, usable_cores
from sparsecast.core.messages import log


def check_cores(threads: list[int]) -> None:
    """Refuse more threads than cores.

    PowerInfer's threads wait for each other in busy loops, so a run then takes minutes in place of
    seconds, and its rate says nothing.

    Raises:
        InputError: More threads than this process may use cores.
    """
    if max(threads) > (cores := usable_cores()):
        raise InputError(
            f"--threads {max(threads)}: this process may use {cores} core(s), and more threads "
            f"than cores wait for each other in busy loops; take --threads {cores} or less"
        )


def check_scratch(folder: Path, need: int, what: str) -> None:
    """Refuse to write more than the temporary folder's disk holds.

    Args:
        need: Bytes that are still to be written.
        what: Names them, such as `--shape 7b: in f16`.

    Raises:
        InputError: Too little space.
    """
    if need > free_bytes(folder):
        raise InputError(
            f"{what} takes {describe_space(folder, need)} ({folder}); make room, or set TMPDIR to "
            "a folder on a larger disk"
        )


def warn_of_memory(files: list[Path]) -> None:
    """Warn where the rows' files do not fit in memory together.

    Rows run in turn, so the system drops each file's pages before it is read again.
    """
    need, there = sum(path.stat().st_size for path in files), total_memory()
    if there is not None and need > there:
        log.warning(
            f"the rows' files take {format_bytes(need)}, but this machine has "
            f"{format_bytes(there)} of memory: runs may read from the disk and be as fast as it is"
        )
