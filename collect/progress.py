"""One progress bar for every stage."""

from __future__ import annotations

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

console = Console(stderr=True)


class Bar:
    """A running bar; `advance` counts units, `note` shows a short figure behind it."""

    def __init__(self, progress: Progress, title: str, total: int | None) -> None:
        self._progress = progress
        self._task = progress.add_task(title, total=total, note="")

    def advance(self, n: int = 1, note: str | None = None) -> None:
        if note is None:
            self._progress.update(self._task, advance=n)
        else:
            self._progress.update(self._task, advance=n, note=note)


@contextmanager
def bar(title: str, total: int | None, *, visible: bool = True) -> Iterator[Bar]:
    """A bar on stderr for `total` units; unknown totals show a pulse."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=not visible) as progress:
        yield Bar(progress, title, total)
