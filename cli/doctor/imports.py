"""Import packages in processes of their own, side by side, and gather what happened."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sparsecast.cli.doctor.finding import one_line

CHILD = "sparsecast.cli.doctor.try_imports"
WITH_TORCH = ("torch", "triton", "accelerate")
UNTRIED = "lightning"
"""Its import takes longer than all others together; its requirements are compared instead."""
TIMEOUT = 120
"""Seconds that one process gets."""


@dataclass
class Imports:
    """What the processes said."""

    errors: dict[str, str | None] = field(default_factory=dict)
    """By module: None if it was imported, else why not, in one line."""
    torch: dict[str, Any] = field(default_factory=lambda: {"error": "was not asked"})
    """See `torch_facts`."""


def import_all(groups: Sequence[Sequence[str]]) -> Imports:
    """Import each group of modules in a process of its own.

    Args:
        groups: Names of modules; `--torch` among them asks for `torch_facts`.
    """
    found = Imports()
    started = [(list(group), _start(group)) for group in groups]
    for group, process in started:
        left = _read(process, group, found)
        while left:  # one of them ended the process
            left = _read(_start(left), left, found)
    return found


def _start(group: Sequence[str]) -> subprocess.Popen[str] | str:
    command = [sys.executable, "-P", "-W", "ignore", "-m", CHILD, *group]
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            errors="replace",
        )
    except (OSError, ValueError) as error:
        return f"Python could not be started ({one_line(error)})"


def _read(process: subprocess.Popen[str] | str, group: list[str], found: Imports) -> list[str]:
    """Gather what a process said; return the modules that it did not come to."""
    out, end = ("", process) if isinstance(process, str) else _finish(process)
    left = list(group)
    for line in out.splitlines():
        try:
            told = json.loads(line)
        except ValueError:
            continue
        if "torch" in told:
            found.torch = told["torch"]
            left.remove("--torch")
        elif told["done"]:
            found.errors[told["name"]] = told["error"]
            left.remove(told["name"])
    for name in left[:1] if isinstance(process, subprocess.Popen) else left:
        if name == "--torch":
            found.torch = {"error": end}
        else:
            found.errors[name] = end
    return left[1:] if isinstance(process, subprocess.Popen) else []


def _finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Return a process's output, and in words how it ended."""
    try:
        out, _ = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        out, _ = process.communicate()
        return out, f"took more than {TIMEOUT} s to import"
    code = process.returncode
    return out, f"ended Python ({f'signal {-code}' if code < 0 else f'exit code {code}'})"


def split_groups(modules: Sequence[str]) -> list[list[str]]:
    """Divide modules into those that import torch and those that do not: two processes that take
    about as long. `UNTRIED` is left out."""
    with_torch = [name for name in modules if name in WITH_TORCH]
    rest = [name for name in modules if name not in (*WITH_TORCH, UNTRIED)]
    return [group for group in ([*with_torch, "--torch"], rest) if group]
