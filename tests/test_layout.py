"""The rules of the house: imports point down, files and functions are short, code has one door."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "core": set(),
    "collect": {"core"},
    "sparsify": {"core"},
    "predictors": {"core", "collect"},
    "export": {"core", "collect", "predictors"},
    "kernels": {"core", "predictors", "export"},
    "integrations": {"core", "collect", "predictors", "export", "kernels", "sparsify"},
    "cli": {"core", "collect", "predictors", "export", "kernels", "sparsify", "integrations"},
}


def sources() -> list[Path]:
    return [path for folder in MAY_IMPORT for path in (ROOT / folder).rglob("*.py")]


def names_of(path: Path) -> set[str]:
    """The modules of sparsecast that a file imports, functions' own imports included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.startswith("sparsecast.")}


@cache
def imported(path: Path) -> set[Path]:
    """The files among them."""
    files = {ROOT / Path(*name.split(".")[1:]).with_suffix(".py") for name in names_of(path)}
    return {file for file in files if file.is_file()}


def reached(path: Path, *, past: Path | None = None) -> dict[Path, Path]:
    """Every file that importing this one imports, each with one that imports it.

    What only `past` imports is left out.
    """
    found: dict[Path, Path] = {}
    todo = [path]
    while todo:
        one = todo.pop()
        if one == past:
            continue
        for file in imported(one) - found.keys():
            found[file] = one
            todo.append(file)
    return found


def test_no_package_has_an_init_file():
    """With one, pytest started here would shadow `kernels` inside transformers."""
    found = [p for folder in (*MAY_IMPORT, "tests") for p in (ROOT / folder).rglob("__init__.py")]
    assert found == []


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    folder = path.relative_to(ROOT).parts[0]
    for name in names_of(path):
        target = name.split(".")[1]
        assert target == folder or target in MAY_IMPORT[folder], name


@pytest.mark.parametrize(
    "path", sorted((ROOT / "kernels" / "ops").glob("*.py")), ids=lambda p: p.stem
)
def test_kernels_import_the_core_alone(path):
    of_stages = [file for file in reached(path) if file.relative_to(ROOT).parts[0] != "core"]
    assert [file for file in of_stages if file.parent != path.parent] == []


WRITERS = tuple(ROOT / "export" / room for room in ("write", "to_gguf", "to_llama"))
SCALES = ROOT / "core" / "models" / "scales.py"
"""The fold that the writers share."""
JUDGED = {ROOT / "export" / "write" / f"{name}.py" for name in ("gpuidx", "hot_cold", "vram")}
OFFLOAD = ROOT / "export" / "engine" / "offload.py"
"""Gives what `JUDGED` makes to the engine, which judges it; no check of ours reads it."""
READERS = [
    *(path for room in ("checks", "read", "engine") for path in (ROOT / "export" / room).glob("*")),
    ROOT / "export" / "verify.py",
]


@pytest.mark.parametrize(
    "path",
    [path for path in sorted(READERS) if path.suffix == ".py"],
    ids=lambda p: str(p.relative_to(ROOT / "export")),
)
def test_what_checks_a_bundle_shares_no_code_with_what_writes_it(path):
    """A mistake of the exporter's would otherwise be the verifier's too."""
    found = reached(path, past=OFFLOAD)
    shared = {f: by for f, by in found.items() if f.parent in WRITERS or f == SCALES}
    assert shared == {}


def test_only_splits_for_the_engine_to_judge_are_the_writers():
    assert {file for file in imported(OFFLOAD) if file.parent in WRITERS} == JUDGED


MOST_LINES, MOST_LINES_OF_A_FUNCTION = 400, 60


def test_files_and_functions_are_short():
    tests = list((ROOT / "tests").rglob("*.py"))
    long = {}
    for path in (*sources(), *tests):
        text = path.read_text()
        name = str(path.relative_to(ROOT))
        if (count := text.count("\n")) > MOST_LINES:
            long[name] = count
        for node in ast.walk(ast.parse(text)) if path not in tests else ():
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                count = node.end_lineno - node.lineno + 1
                if count > MOST_LINES_OF_A_FUNCTION:
                    long[f"{name}: {node.name}"] = count
    assert long == {}


def test_kernels_stand_on_torch_and_triton_alone():
    names = sorted(path.stem for path in (ROOT / "kernels" / "ops").glob("*.py"))
    assert len(names) > 10
    code = "import importlib, sys\n" + "".join(
        f"importlib.import_module('sparsecast.kernels.ops.{name}')\n" for name in names
    )
    code += "print({'transformers', 'lightning', 'datasets', 'gguf', 'rich'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_every_folder_with_code_is_packaged():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {f"sparsecast.{folder}": folder for folder in MAY_IMPORT}
    assert project["package-dir"] == {"sparsecast": "cli/entry", **folders}
    with_code = {path.relative_to(ROOT).parent for path in sources()} - {Path("cli/entry")}
    packages = {".".join(("sparsecast", *folder.parts)) for folder in with_code}
    assert set(project["packages"]) == {"sparsecast", *packages}


def test_pickles_are_only_loaded_as_weights():
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                safe = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert safe.get("weights_only") == "True", path


LOADERS = {"from_pretrained", "from_config"}


def test_models_come_through_one_door_that_runs_none_of_their_code():
    """Every call of transformers' loaders says so, and those that read files stand in one place."""
    found = set()
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert ast.unparse(node.value) == "False", path
            if isinstance(node, ast.Attribute) and node.attr == "from_pretrained":
                assert path == ROOT / "core" / "models" / "pretrained.py", path
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in LOADERS:
                said = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert said.get("trust_remote_code") == "False", path
                found.add(ast.unparse(node.func))
    assert {"AutoModelForCausalLM.from_pretrained", "kind.from_pretrained"} <= found


def test_nothing_asks_on_the_terminal():
    """Standard input is a corpus, read in one place."""
    for path in sources():
        text = ast.unparse(ast.parse(path.read_text()))
        assert not re.search(r"(?<![\w.])(input|getpass)\(", text), path
        assert "sys.stdin" not in text or path.name.startswith("corpus"), path
