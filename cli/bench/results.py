"""Show and save the numbers of a benchmark."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from sparsecast.core.files import check_writable_file, write_json


def check_json(path: Path | None) -> None:
    """Refuse a --json that cannot be written, before the benchmark runs."""
    if path is not None:
        check_writable_file(path, "--json")


def publish(
    values: dict[str, Any], path: Path | None, show: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Show `values`, write them to `path` if there is one, and return them."""
    show(values)
    if path is not None:
        write_json(path, values)
    return values


def new_table(*columns: str, left: Sequence[str] = ("",), title: str | None = None) -> Table:
    """An empty table; columns other than `left` are aligned to the right."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right")
    return table
