"""One progress bar for every stage.

Where stderr is no terminal, a bar is a log line a minute and one when it ends.
SPARSECAST_DISABLE_PROGRESS=1 switches bars and their lines off.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from sparsecast.core.messages import log

console = Console(stderr=True, markup=False, highlight=False)
"""Prints text as it stands: names of files and words of a corpus may hold [brackets]."""
LOG_SECONDS = 60.0
"""Between two lines of a log."""


class Bar:
    """A running bar: `advance` counts units, `note` is a short text behind them."""

    def __init__(self, progress: Progress, title: str, total: int | None) -> None:
        self._progress = progress
        self._task = progress.add_task(title, total=total, note="")

    def advance(self, n: int = 1, note: str | None = None) -> None:
        if note is None:
            self._progress.update(self._task, advance=n)
        else:
            self._progress.update(self._task, advance=n, note=note)


class LogBar(Bar):
    """A bar as lines of a log file or a pipe."""

    def __init__(self, title: str, total: int | None) -> None:
        self._title, self._total, self._done, self._note = title, total, 0, ""
        self._start = self._told = time.monotonic()

    def advance(self, n: int = 1, note: str | None = None) -> None:
        self._done += n
        self._note = self._note if note is None else note
        if time.monotonic() - self._told >= LOG_SECONDS:
            self.tell()

    def tell(self) -> None:
        """Write the line."""
        self._told = time.monotonic()
        minutes, seconds = divmod(round(self._told - self._start), 60)
        count = f"{self._done:,}"
        if self._total:
            count = f"{self._done / self._total:.0%}, {count} of {self._total:,}"
        note = f", {self._note}" if self._note else ""
        line = f"{self._title}: {count} in {minutes}:{seconds:02}{note}"
        log.info(line)


@contextmanager
def progress_bar(title: str, total: int | None, *, visible: bool = True) -> Iterator[Bar]:
    """Show a bar on stderr for `total` units; an unknown total shows a pulse."""
    visible = visible and os.environ.get("SPARSECAST_DISABLE_PROGRESS", "0") in ("", "0")
    if visible and not console.is_terminal:
        lines = LogBar(title, total)
        try:
            yield lines
        finally:
            lines.tell()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=console, disable=not visible) as progress:
        yield Bar(progress, title, total)
