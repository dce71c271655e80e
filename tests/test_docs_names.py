"""Files that documents and docstrings name exist, and so do the objects of the API pages."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
FOLDERS = "core|collect|predictors|export|kernels|sparsify|integrations|cli|tests|docs"


def found(pattern: str) -> list[tuple[str, str]]:
    """(page, match) of every match in any page."""
    return [
        (str(page.relative_to(ROOT)), match)
        for page in PAGES
        for match in re.findall(pattern, page.read_text(encoding="utf-8"), re.MULTILINE)
    ]


def test_every_file_that_a_page_names_exists():
    named = found(rf"`((?:{FOLDERS})/[\w./-]*)(?:`|:)")
    assert len(named) > 10
    missing = [f"{page}: {path}" for page, path in named if not (ROOT / path).exists()]
    assert missing == []


PACKAGE = ("core", "collect", "predictors", "export", "kernels", "sparsify", "integrations", "cli")
SOURCES = sorted(path for folder in PACKAGE for path in (ROOT / folder).rglob("*.py"))
THEIRS = {"convert.py", "powerinfer-py/export_split.py", "powerinfer-py/solver.py"}
"""Files of PowerInfer that docstrings name."""


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_file_that_a_docstring_names_exists(path):
    """A bare name is a file beside it; one of another folder is named from the root."""
    named = re.findall(r"(?<![\w/.-])[\w/-]+\.py\b", path.read_text(encoding="utf-8"))
    missing = [
        name
        for name in named
        if name not in THEIRS and not (ROOT / name if "/" in name else path.parent / name).exists()
    ]
    assert missing == []


@pytest.mark.parametrize(("page", "target"), found(r"^::: (sparsecast\.\S+)$"))
def test_every_object_of_the_api_pages_exists(page, target):
    module, _, name = target.rpartition(".")
    assert hasattr(import_module(module), name), f"{page}: {target} was renamed or moved"
