"""The layout that keeps Hugging Face's `kernels` importable, and imports that point down."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
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
    "cli": {"core", "collect", "predictors", "export", "kernels", "sparsify"},
}


def sources() -> list[Path]:
    return [path for folder in MAY_IMPORT for path in (ROOT / folder).rglob("*.py")]


def test_no_package_has_an_init_file():
    """With one, pytest started here would shadow `kernels` inside transformers."""
    found = [p for folder in (*MAY_IMPORT, "tests") for p in (ROOT / folder).rglob("__init__.py")]
    assert found == []


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    folder = path.relative_to(ROOT).parts[0]
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        assert not (isinstance(node, ast.ImportFrom) and node.level), "relative import"
        for name in names:
            if name.startswith("sparsecast."):
                target = name.split(".")[1]
                assert target == folder or target in MAY_IMPORT[folder], name


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
