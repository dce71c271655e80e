"""Memory: what this process may have, what it holds, and the most that it held inside a block.

What a process holds are two kinds of pages: its own (anonymous), and pages of files that it has
mapped, which the system drops and reads again when others need the room. Linux alone tells both;
elsewhere what is held counts as 0.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from sparsecast.core.disk import format_bytes
from sparsecast.core.errors import InputError
from sparsecast.core.machine import total_memory

UNLIMITED = 1 << 60
"""From here on a cgroup's limit is none."""
EVERY = 0.002
"""Seconds between two looks at what is held."""


class Held(NamedTuple):
    """Bytes of this process in main memory."""

    own: int
    files: int


def held() -> Held:
    """Return what this process holds now; zeros where the system does not say."""
    fields = _fields(Path("/proc/self/status"))
    return Held(fields.get("RssAnon", 0), fields.get("RssFile", 0))


def most_held() -> int:
    """Return the most bytes that this process has held so far, mapped files included."""
    return _fields(Path("/proc/self/status")).get("VmHWM", 0)


class Peak:
    """The most bytes of its own that the process has held so far."""

    own = 0


@contextmanager
def watch_memory() -> Iterator[Peak]:
    """Watch what the process holds of its own until the block ends."""
    peak, done = Peak(), threading.Event()

    def look() -> None:
        while not done.wait(EVERY):
            peak.own = max(peak.own, held().own)

    watcher = threading.Thread(target=look, name="memory", daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
        peak.own = max(peak.own, held().own)


def host_limit() -> int | None:
    """Return the most bytes that this process can ever hold: RAM and swap, or its cgroup's limit.

    None where the system does not say.
    """
    fields = _fields(Path("/proc/meminfo"))
    whole = fields.get("MemTotal", total_memory() or 0) + fields.get("SwapTotal", 0)
    return min([*_cgroup_limits(), *([whole] if whole else [])], default=None)


def host_available() -> int | None:
    """Return how many bytes a process can get now without others being pushed out."""
    free = _fields(Path("/proc/meminfo")).get("MemAvailable")
    return min([*_cgroup_limits(), *([] if free is None else [free])], default=None)


def device_limit(device: torch.device) -> int | None:
    """Return the bytes of a GPU's memory, None on a CPU."""
    return None if device.type == "cpu" else torch.cuda.mem_get_info(device)[1]


def device_available(device: torch.device) -> int | None:
    """Return the bytes of a GPU's memory that are free now, None on a CPU."""
    return None if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]


def check_memory(
    what: str, device: torch.device, *, host: int = 0, on_device: int = 0, instead: str
) -> None:
    """Raise `InputError` if a run takes more memory than there is at all, in use or not.

    Args:
        what: Names the run and what takes the memory.
        host: Bytes that this process will hold for certain, without mapped files.
        on_device: The same on `device`, where that is a GPU.
        instead: What would help.
    """
    for need, limit, where in (
        (host, host_limit(), "this process can get"),
        (on_device, device_limit(device), f"{device} has"),
    ):
        if limit is not None and need > limit:
            raise InputError(
                f"{what} needs {format_bytes(need)} of memory, but {where} "
                f"{format_bytes(limit)} in all; {instead}"
            )


def _fields(path: Path) -> dict[str, int]:
    """Read the lines `name: number kB` of a file of /proc, in bytes."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError:
        return {}
    parts = (line.replace(":", " ").split() for line in lines if line.endswith(" kB"))
    return {name: int(count) * 1024 for name, count, _ in parts}


def _cgroup_limits(
    proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> list[int]:
    """Return the limits of this process's cgroups: version 2 with swap, and version 1."""
    try:
        lines = [line.split(":", 2) for line in proc.read_text("utf-8").splitlines()]
    except OSError:
        return []
    limits = []
    for _, controllers, where in lines:
        if controllers not in ("", "memory"):
            continue
        top = root / controllers
        here = top / where.lstrip("/")
        # A container sees its own group as the root, whatever /proc calls it.
        for folder in (here, *(p for p in here.parents if p.is_relative_to(top))):
            if controllers:
                found = _number(folder / "memory.limit_in_bytes")
            elif (found := _number(folder / "memory.max")) is not None:
                found += _number(folder / "memory.swap.max") or 0
            if found is not None and found < UNLIMITED:
                limits.append(found)
    return limits


def _number(path: Path) -> int | None:
    """Return the number in a file; `max` is no limit, and None a file that is not there."""
    try:
        text = path.read_text("utf-8").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else UNLIMITED
