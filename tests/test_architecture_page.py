"""docs/architecture.md lists the files of the package, each once and in its place."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
FOLDERS = ("core", "collect", "predictors", "export", "kernels", "sparsify", "integrations", "cli")
LINE = re.compile(r"( *)(\S+)(?: +(\S.*))?")


def tree() -> dict[str, str]:
    """Path to description of every line of the page's tree, folders with a / at their end."""
    text = PAGE.read_text(encoding="utf-8").partition("## Files\n\n```text\n")[2]
    lines: dict[str, str] = {}
    above: list[str] = []
    for line in text.partition("```")[0].splitlines():
        match = LINE.fullmatch(line)
        assert match, f"docs/architecture.md: expected 'name   description', found {line!r}"
        indent, name, description = match.groups()
        above[len(indent) // 2 :] = [name]
        path = "".join(above)
        assert path not in lines, f"docs/architecture.md: {path} stands twice"
        lines[path] = description or ""
    return lines


def files() -> set[str]:
    """The package's files and the folders that hold them, as the tree writes them."""
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    names = {path.relative_to(ROOT).as_posix() for path in paths}
    return names | {f"{folder}/" for name in names for folder in parents(name)}


def parents(name: str) -> list[str]:
    parts = name.split("/")[:-1]
    return ["/".join(parts[: i + 1]) for i in range(len(parts))]


def line_for(name: str) -> str:
    """The line to add for a file, with the first line of its docstring."""
    depth, own = name.rstrip("/").count("/"), name.rstrip("/").rpartition("/")[2]
    summary = ""
    if name.endswith(".py"):
        summary = (ast.get_docstring(ast.parse((ROOT / name).read_text())) or "").split("\n")[0]
    return f"{'  ' * depth + own:<35}{summary}"


def test_the_tree_lists_exactly_the_files():
    listed, there = set(tree()), files()
    missing = [f"{name}: add\n  {line_for(name)}" for name in sorted(there - listed)]
    stale = [f"{name}: remove this line, no such file" for name in sorted(listed - there)]
    assert not missing + stale, "docs/architecture.md, Files:\n" + "\n".join(missing + stale)


def test_every_line_says_what_the_file_is_for():
    assert [path for path, description in tree().items() if not description] == []
