"""What a run will take, told before it starts: disk, memory, time. Shared by all stages."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
from rich.table import Table

from sparsecast.core.disk import format_bytes, free_bytes
from sparsecast.core.errors import InputError
from sparsecast.core.memory import (
    check_memory,
    device_available,
    held,
    host_available,
)
from sparsecast.core.messages import log, show

LONG = 2.0
"""Seconds after which work is measured once, without a first time to warm up."""
MOST = 5
"""Times that work is measured."""
PYTHON = "Python and open inputs"
UNMEASURED = "not measured, since the run does not fit"
PAGES = "mapped files, if there is room"


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a run takes; bytes are those of one process."""

    what: str
    """The run, which titles the table."""
    out: Path | None
    """The folder to write; None for a run that writes none."""
    disk: int = 0
    """The most bytes that the run still adds to the disk at any moment."""
    device: torch.device
    host: Mapping[str, int]
    """Bytes of main memory by use, at the peak."""
    pages: int = 0
    """Bytes of mapped files on top of `host`, which the system drops when others need the room."""
    on_device: Mapping[str, int] = field(default_factory=dict)
    """Bytes of a GPU's memory by use."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """By part of the run; empty if nothing was measured."""
    note: str
    """How time was measured, or why it was not."""
    processes: int = 1

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())

    @property
    def device_bytes(self) -> int:
        return sum(self.on_device.values())


def show_forecast(found: Forecast) -> None:
    """Show a forecast as a table."""
    each = f" of each of {found.processes} processes" if found.processes > 1 else ""
    rows = {
        "disk": "none, no folder is written"
        if found.out is None
        else format_bytes(found.disk) + _free(free_bytes(found.out)),
        f"host memory{each}": format_bytes(found.host_bytes + found.pages)
        + _free(host_available()),
        **_indented({**found.host, PAGES: found.pages}, format_bytes),
        f"device memory{each}": "none, it runs on the CPU",
    }
    if found.device.type != "cpu":
        free = _free(device_available(found.device))
        rows[f"device memory{each}"] = format_bytes(found.device_bytes) + free
        rows |= _indented(found.on_device, format_bytes)
    total = sum(found.seconds.values())
    rows["time"] = f"{_clock(total)}, {found.note}" if found.seconds else found.note
    rows |= _indented(found.seconds, _clock)
    show_rows(f"{found.what}: a dry run, nothing is written", rows)


def show_rows(title: str, rows: Mapping[str, str]) -> None:
    """Show names and values in two columns."""
    log.info(title, extra={"style": "italic"})
    table = Table(box=None, show_header=False)
    for row in rows.items():
        table.add_row(*row)
    show(table)


def check_forecast(found: Forecast, instead: str) -> None:
    """Raise `InputError` if a run takes more memory than there is, by all that was measured."""
    check_memory(
        found.what,
        found.device,
        host=found.host_bytes,
        on_device=found.device_bytes,
        instead=instead,
    )


def _indented(parts: Mapping[str, float], shown: Callable[[float], str]) -> dict[str, str]:
    return {f"  {name}": shown(value) for name, value in parts.items() if value}


def _free(nbytes: int | None) -> str:
    return "" if nbytes is None else f", {format_bytes(nbytes)} are free"


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=max(1, round(seconds))))


def base_memory(device: torch.device) -> int:
    """Return what this process holds before a run's own work: interpreter, packages, inputs."""
    torch.ones(8, 8, device=device).mm(torch.ones(8, 8, device=device)).sum().item()
    return sum(held())


def extrapolate(layers: int, measured: Mapping[int, float]) -> float:
    """Return what `layers` take, linearly from what one or two smaller numbers of them take."""
    (least, low), (most, high) = min(measured.items()), max(measured.items())
    each = max(0.0, high - low) / (most - least) if most > least else 0.0
    return low + (layers - least) * each


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of `work`: the least of a few behind one that warms up, or of the only one
    if that took long."""
    first = seconds_of(work, device)
    if first > LONG:
        return first
    again = [seconds_of(work, device)]
    while sum(again) < LONG / 2 and len(again) < MOST:
        again.append(seconds_of(work, device))
    return min(again)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of `work`, those of the device included."""
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def refuse_dry_run(asked: bool, function: str) -> None:
    """Raise `InputError` from a stage's function that was given --dry-run: another one tells it."""
    if asked:
        raise InputError(f"dry_run: is told by sparsecast.{function}; call that with this config")
