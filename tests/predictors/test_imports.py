"""The folders of predictors/ import one way, and only the stages see their options."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "predictors"
FOLDERS = ("calibration", "training", "baselines", "report")
"""Each folder may import the ones before it."""
ENTRY_MODULES = {"train", "planning", "recipes", "evaluate"}
ENTRY_MODULES |= {"train_dry_run", "train_measure", "evaluate_dry_run"}
"""Top-level files above the folders; all others are below them."""
SEES_OPTIONS = {"train.py", "planning.py", "evaluate.py", "report/run.py"}
SEES_OPTIONS |= {"train_dry_run.py", "evaluate_dry_run.py"}


def imported(path: Path) -> set[str]:
    """Modules of predictors/ that a file imports, such as training.plan."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if type(node) is ast.ImportFrom]
    names = [node.module or "" for node in nodes]
    package = "sparsecast.predictors."
    return {name.removeprefix(package) for name in names if name.startswith(package)}


def level(module: str) -> int:
    """Height of a module: basics of the top level, then the folders, then the stages."""
    first = module.split(".")[0]
    if first in FOLDERS:
        return 1 + FOLDERS.index(first)
    return 1 + len(FOLDERS) if first in ENTRY_MODULES else 0


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_between_folders_point_one_way(path):
    own = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for name in imported(path) - {"config"}:
        if own != "config":
            assert level(name) <= level(own), f"{own} imports {name}"


def test_only_the_stages_see_their_options():
    seen = {
        str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py") if "config" in imported(path)
    }
    assert seen == SEES_OPTIONS
