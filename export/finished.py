"""Recognize a bundle that an earlier export has already written."""

from __future__ import annotations

from pathlib import Path

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
    out = plan.out
    found = sorted(out.glob(f"*{SUFFIX}"))
    if not found:
        return None
    advice = "choose another --out or remove the folder"
    try:
        text = GGUFFile(found[0]).keys.get(KEY_RECIPE)
        recipe = parse_json(text) if isinstance(text, str) else None
        load_predictors(out / "predictor")
    except ValueError as error:  # an `InputError` is one
        raise InputError(f"{out}: holds a damaged bundle ({error}); {advice}") from error
    if not isinstance(recipe, dict):
        raise InputError(f"{out}: holds a bundle that does not say how it was made; {advice}")
    changes = compare_options({**recipe, "name": found[0].name}, {**plan.recipe, "name": plan.file})
    check_unchanged(out, "a finished bundle", changes, finished=True)
    return found[0]
