"""Messages under "When something goes wrong" in guides and integrations are the program's own."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = ("core", "collect", "predictors", "export", "kernels", "sparsify", "integrations", "cli")
TITLE = "## When something goes wrong"
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
GUIDES += sorted(p for p in (ROOT / "docs/integrations").glob("*.md") if TITLE in p.read_text())
VALUE = re.compile(r"\.\.\.|'[^']*'|\*\S+|(?:float)?\d[\d.,]*|[\[\]():;]|, ")
"""What stands for a value of the run, or lies between two messages' parts."""


def quoted(page: Path) -> list[str]:
    """The messages in the first column of the page's last table."""
    table = page.read_text().partition(TITLE)[2]
    cells = [row.split(" | ")[0] for row in table.splitlines() if row.startswith("| `")]
    return [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]


@cache
def strings() -> str:
    """The package's strings without docstrings, cut at punctuation and at f-strings' values."""
    found = []
    for folder in CODE:
        for path in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(path.read_text())
            alone = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
            for node in ast.walk(tree):
                if isinstance(node, ast.JoinedStr):
                    parts = [v.value if isinstance(v, ast.Constant) else "\0" for v in node.values]
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found += [] if id(node) in alone else [node.value]
    runs = (run for text in found for run in re.split(r"[\0:;,()\[\]]", text))
    return "\n".join(f" {' '.join(run.split())} " for run in runs)


def is_said(run: str) -> bool:
    """Whether few of the program's strings, one after the other, give these words.

    A single word must be a string by itself, such as "holds" between two values.
    """
    words, pieces, start = run.split(), 0, 0
    while start < len(words):
        ends = range(len(words), start, -1)
        end = next((e for e in ends if f" {' '.join(words[start:e])} " in strings()), start)
        if end <= start + 1 and f"\n {words[start]} \n" not in strings():
            return False
        end = max(end, start + 1)
        pieces, start = pieces + 1, end
    return pieces <= (len(words) + 1) // 2


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_quoted_messages_are_in_the_code(page):
    messages = quoted(page)
    assert messages
    for message in messages:
        runs = [run.strip() for run in VALUE.split(message)]
        assert all(is_said(run) for run in runs if len(run.split()) > 1), message


def test_other_words_are_not_taken_for_a_message():
    assert is_said("calibration reached a recall of")
    assert not is_said("came to a recall of")
    assert not is_said("holds a finished cupboard made differently")
