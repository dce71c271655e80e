"""Recognize a bundle that an earlier export has already written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsecast.core.earlier_runs import check_unchanged, compare_options
from sparsecast.core.errors import InputError
from sparsecast.core.files import parse_json
from sparsecast.export.bundle import SUFFIX
from sparsecast.export.plan import ExportPlan
from sparsecast.export.read.reader import GGUFFile
from sparsecast.export.write.writer import KEY_RECIPE
from sparsecast.predictors.checkpoint import load_predictors


def find_finished(plan: ExportPlan) -> Path | None:
    """Return the GGUF file of a bundle with the plan's recipe; None where there is no bundle.

    Raises:
        InputError: The bundle there has another recipe, or is damaged.
    """

    def check(out: Path) -> None:
        load_predictors(out / "predictor")

    return finished_file(plan.out, SUFFIX, plan.recipe, plan.file, check, what="bundle")


def finished_file(
    out: Path,
    suffix: str,
    recipe: dict[str, Any],
    name: str,
    check: Callable[[Path], object] = lambda out: None,
    *,
    what: str = "file",
) -> Path | None:
    """Return the GGUF file in `out` with this recipe and name; None where there is none.

    Args:
        check: Raises `ValueError` where the rest of the folder is damaged.
        what: What the folder is, in errors.

    Raises:
        InputError: The file there has another recipe or name, or is damaged.
    """
    found = sorted(out.glob(f"*{suffix}"))
    if not found:
        return None
    advice = "choose another --out or remove the folder"
    try:
        text = GGUFFile(found[0]).keys.get(KEY_RECIPE)
        there = parse_json(text) if isinstance(text, str) else None
        check(out)
    except ValueError as error:  # an `InputError` is one
        raise InputError(f"{out}: holds a damaged {what} ({error}); {advice}") from error
    if not isinstance(there, dict):
        raise InputError(f"{out}: holds a {what} that does not say how it was made; {advice}")
    changes = compare_options({**there, "name": found[0].name}, {**recipe, "name": name})
    check_unchanged(out, f"a finished {what}", changes, finished=True)
    return found[0]
