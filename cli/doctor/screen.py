"""What doctor prints: packages that work in one paragraph, everything else a line each."""

from __future__ import annotations

import platform
import shutil
import textwrap
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from sparsecast.cli.doctor.finding import Finding

MARKS = {"ok": "ok", "note": "-", "fix": "FIX"}
NAME_WIDTH = 16
LEAST_WIDTH, MOST_WIDTH = 60, 120


def screen_text(findings: Sequence[Finding], to_do: Sequence[str]) -> str:
    """Return the text of a screen that is as wide as the terminal.

    Args:
        findings: Parts stand together.
        to_do: What to do until all works.
    """
    width = min(max(shutil.get_terminal_size((100, 24)).columns, LEAST_WIDTH), MOST_WIDTH)
    lines = [f"sparsecast {_version()} on {platform.platform(terse=True)}", ""]
    working = [f for f in findings if f.part == "packages" and f.state == "ok"]
    for finding in findings:
        if finding not in working:
            told = finding.found + (f"; {finding.to_do}" if finding.to_do else "")
            lines += _row(MARKS[finding.state], finding.name, told, width)
        elif finding is working[0]:
            told = ", ".join(f"{f.name} {f.found}" for f in working)
            lines += _row("ok", f"{len(working)} packages", told, width)
    lines.append("")
    if not to_do:
        lines.append("Everything that every stage needs works.")
    else:
        lines.append("To do:")
        for number, what in enumerate(to_do, 1):
            lines += textwrap.wrap(f"{number}. {what}", width, subsequent_indent="   ")
    return "\n".join(lines) + "\n"


def _row(mark: str, name: str, told: str, width: int) -> list[str]:
    indent = " " * (5 + NAME_WIDTH + 1)
    head = f"{mark:<5}{name:<{NAME_WIDTH}} "
    return textwrap.wrap(
        told,
        width,
        initial_indent=head,
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,
    )


def _version() -> str:
    try:
        return version("sparsecast")
    except PackageNotFoundError:
        return "(not installed)"
