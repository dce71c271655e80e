"""Messages of the stages, sent through `logging` so that the caller decides where they go.

The command line prints them (cli/screen.py). From Python, `logging.basicConfig(level="INFO")` shows
them; without it only warnings and errors reach stderr.
"""

from __future__ import annotations

import io
import logging

from rich.console import Console, RenderableType

log = logging.getLogger("sparsecast")
"""Every message of the package."""
TABLE_WIDTH = 120
"""Columns of a table where it is logged as plain text."""


class Rendered:
    """A table or a heading as a log message: the command line draws it, other handlers get text."""

    def __init__(self, renderable: RenderableType) -> None:
        self.renderable = renderable

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=TABLE_WIDTH, markup=False, highlight=False).print(self.renderable)
        return text.getvalue().rstrip("\n")


def show(renderable: RenderableType) -> None:
    """Log a table, a heading, or anything else that rich can draw, at level INFO."""
    log.info(Rendered(renderable))
