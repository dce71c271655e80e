"""The curves of one phase as a CSV file that grows while it trains.

    step, tokens        counted from the start of the run, pre-training included
    loss, l1            mean NLL in nats, and the sum over layers of the mean |x1|
    lambda, lr          weight of the L1 term and learning rate of that step
    threshold, wanted   T and the share of zeros that is wanted from then on; 0 without a target
    sparsity            share of zeros in x1, the mean over layers
    sparsity_0, ...     the same of each layer
    dead_0, ...         neurons of each layer that fired for no token since the row before

loss, l1 and sparsity are means over the steps since the row before.
"""

from __future__ import annotations

import csv
import shutil
from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import NamedTuple

from sparsecast.core.files import write_text

CURVES = "curves"
"""Folder of the curves, in the work folder and in the finished model."""
SUFFIX = ".csv"
TENSORBOARD = "tensorboard"
"""Folder in it with a folder of event files per phase."""


class Row(NamedTuple):
    """One row, see above."""

    step: int
    tokens: int
    loss: float
    l1: float
    weight: float
    """lambda."""
    lr: float
    sparsity_L: Sequence[float]
    dead_L: Sequence[int]
    threshold: float = 0.0
    wanted: float = 0.0

    @property
    def sparsity(self) -> float:
        return sum(self.sparsity_L) / len(self.sparsity_L)


def table_path(folder: Path, phase: str) -> Path:
    """Return the path of a phase's table; `read_tables` finds the phase's name in it."""
    return folder / f"{phase.replace(' ', '_')}{SUFFIX}"


def begin_table(path: Path, layers: int, step: int) -> None:
    """Begin a table, or keep the rows up to `step` of one that a killed run has left.

    Rows that are damaged are left out.
    """
    names = ["step", "tokens", "loss", "l1", "lambda", "lr", "threshold", "wanted", "sparsity"]
    names += [f"{name}_{layer}" for name in ("sparsity", "dead") for layer in range(layers)]
    kept = []
    if path.is_file():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)[1:]
        kept = [line for line in lines if line.endswith("\n") and _step(line, names) <= step]
    write_text(path, ",".join(names) + "\n" + "".join(kept))


def append_row(path: Path, row: Row) -> None:
    """Append a row, on the disk's side of a crash of this process."""
    steering = (row.weight, row.lr, row.threshold, row.wanted)
    measured = (row.loss, row.l1, *steering, row.sparsity, *row.sparsity_L)
    values = (row.step, row.tokens, *(f"{value:.6g}" for value in measured), *row.dead_L)
    with path.open("a", encoding="utf-8") as file:
        file.write(",".join(map(str, values)) + "\n")


def read_tables(folder: Path) -> dict[str, list[Row]]:
    """Read the tables of all phases that have rows, by name, in the order of their files."""
    found = {}
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        with path.open(encoding="utf-8", newline="") as file:
            if rows := [_row(line) for line in csv.DictReader(file)]:
                found[path.stem.replace("_", " ")] = rows
    return found


def copy_curves(work: Path, folder: Path) -> None:
    """Copy the curves of a run; event files lose the names of the machine and its processes."""
    shutil.copytree(work, folder)
    for phase in (folder / TENSORBOARD).iterdir():
        for number, path in enumerate(sorted(phase.iterdir())):
            path.rename(path.with_name(f"events.out.tfevents.{number:04}"))


def _row(line: dict[str, str]) -> Row:
    return Row(
        step=int(line["step"]),
        tokens=int(line["tokens"]),
        loss=float(line["loss"]),
        l1=float(line["l1"]),
        weight=float(line["lambda"]),
        lr=float(line["lr"]),
        sparsity_L=[float(value) for name, value in line.items() if name.startswith("sparsity_")],
        dead_L=[int(value) for name, value in line.items() if name.startswith("dead_")],
        threshold=float(line["threshold"]),
        wanted=float(line["wanted"]),
    )


def _step(line: str, names: Sequence[str]) -> float:
    """Return the step of a row with these columns; infinity if it is damaged."""
    try:
        return _row(dict(zip(names, line.rstrip("\n").split(","), strict=True))).step
    except ValueError:
        return inf
