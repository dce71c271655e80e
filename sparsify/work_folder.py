"""The hidden folder of an unfinished run: begin it, resume it, clear it, and reserve disk space.

`.<out>.work` beside the output holds the tokens, the finished phases and the last checkpoint.
A run with other options can replace it until something has been trained.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsecast.core.disk import check_disk_space, full_disk_errno, full_disk_error
from sparsecast.core.earlier_runs import check_unchanged, compare_options
from sparsecast.core.errors import InputError
from sparsecast.core.files import hidden_sibling, read_json, write_json
from sparsecast.core.interrupts import interrupt_like
from sparsecast.core.messages import log

FACTS = "sparsify.json"
"""File of a finished model with its options and scores."""
OPTIONS = "options.json"


class Diverged(InputError):
    """Training has destroyed the model; a run with the same options would do so again."""


@dataclass
class WorkFolder:
    """A folder and the disk space that the whole run needs."""

    path: Path
    needs: float = 0.0
    """Bytes, as far as they are known."""

    @property
    def trained(self) -> bool:
        """Whether a phase is finished or has a checkpoint."""
        return any(self.path.glob("*.pt")) or any(self.path.glob("*.ckpt"))

    def reserve(self, parameters: int, phases: int, rows: int, saved_bytes: int) -> None:
        """Compute the disk space that the run needs and refuse a disk that is too small."""
        self.needs = disk_needed(parameters, phases, rows, saved_bytes)
        there = sum(path.stat().st_size for path in self.path.rglob("*") if path.is_file())
        check_disk_space(self.path.parent, int(self.needs) - there, "the run")


def disk_needed(parameters: int, phases: int, rows: int, saved_bytes: int) -> float:
    """Return the bytes of disk that a run takes.

    Each phase leaves weights and two AdamW moments in float32, and the current checkpoint is as
    large.

    Args:
        rows: Bytes of the training sequences.
        saved_bytes: Of a parameter in the finished model.
    """
    return 12.0 * parameters * (phases + 1) + rows + saved_bytes * parameters


def is_finished(out: Path, options: dict[str, Any]) -> bool:
    """Return whether `out` holds the model of these options.

    Raises:
        InputError: It holds a model of other options.
    """
    if not (out / FACTS).is_file():
        return False
    earlier = read_json(out / FACTS, "what sparsify measured").get("options")
    if not isinstance(earlier, dict):
        raise InputError(
            f"{out}: holds a finished model whose options were not written down; choose another "
            "--out or remove the folder"
        )
    check_unchanged(out, "a finished model", compare_options(earlier, options), finished=True)
    log.info(f"{out}: already sparsified with these options")
    return True


def work_path(out: Path) -> Path:
    """Return the path of the work folder of a run that writes to `out`."""
    return hidden_sibling(out, "work")


@contextmanager
def work_folder(out: Path, options: dict[str, Any]) -> Iterator[WorkFolder]:
    """Begin or resume the work folder of a run; remove it when the run is finished.

    Raises:
        InputError: An unfinished run was started with other options.
        OSError: The disk is full. The message says how much is needed and how to continue.
        KeyboardInterrupt: The message says how to continue.
    """
    work = WorkFolder(work_path(out))
    _begin_or_resume(work, options)
    try:
        yield work
    except BaseException as error:
        if isinstance(error, Diverged) or not work.trained:
            shutil.rmtree(work.path, ignore_errors=True)
        left = (
            "the same command goes on from the last checkpoint"
            if work.trained
            else "nothing was trained yet, nothing is left behind"
        )
        if isinstance(error, KeyboardInterrupt):
            raise interrupt_like(error, f"{out}: interrupted; {left}") from None
        if full_disk_errno(error) is not None:
            advice = f"make room; {left}"
            raise full_disk_error(error, work.path.parent, work.needs, "the run", advice) from error
        raise
    shutil.rmtree(work.path, ignore_errors=True)


def _begin_or_resume(work: WorkFolder, options: dict[str, Any]) -> None:
    path = work.path / OPTIONS
    options = json.loads(json.dumps(options))
    if not work.trained:
        shutil.rmtree(work.path, ignore_errors=True)
    else:
        earlier = read_json(path, "the options of an unfinished run")
        changes = compare_options(earlier, options)
        check_unchanged(work.path, "an unfinished run", changes, finished=False)
    for leftover in work.path.glob(".*.part"):
        leftover.unlink()
    try:
        work.path.mkdir(parents=True, exist_ok=True)
        write_json(path, options)
    except OSError as error:
        raise InputError(
            f"{work.path}: cannot be written ({error.strerror or error}); choose another --out"
        ) from error
