"""What is built: the source archive has the documents and makes the same wheel, which runs."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = {"README.md", "CHANGELOG.md", "LICENSE", "Makefile", "pyproject.toml"}
DOCUMENTS |= {"CONTRIBUTING.md", "SECURITY.md", "mkdocs.yml"}
CODE = {"core", "collect", "predictors", "export", "kernels", "sparsify", "integrations", "cli"}
FOLDERS = CODE | {"docs", "examples", "tests"}
BUILD = """
import sys
from setuptools import build_meta
out = sys.argv[1]  # which setuptools rewrites
build_meta.build_sdist(out)
build_meta.build_wheel(out)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with both archives, of a copy that the build may litter."""
    pytest.importorskip("setuptools", minversion="77")
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("dist")
    for path in ROOT.iterdir():
        if path.name in DOCUMENTS | {"MANIFEST.in"}:
            shutil.copy(path, copy)
        elif path.name in FOLDERS:
            shutil.copytree(path, copy / path.name, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(
        [sys.executable, "-c", BUILD, str(out)], cwd=copy, check=True, capture_output=True
    )
    return out


def test_the_source_archive_has_the_documents_and_the_tests(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= DOCUMENTS
    assert {"cli/entry/__main__.py", "tests/test_packaging.py", "tests/conftest.py"} <= names
    assert {"docs/index.md", "docs/guides/collect.md", "examples/model_to_report.ipynb"} <= names
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]


def test_the_source_archive_makes_the_same_wheel(built, tmp_path):
    """What an installer without wheels does, such as a distribution's."""
    (source,), (wheel,) = built.glob("*.tar.gz"), built.glob("*.whl")
    with tarfile.open(source) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    code = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    command = [sys.executable, "-c", code, str(tmp_path)]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    with zipfile.ZipFile(wheel) as want, zipfile.ZipFile(tmp_path / wheel.name) as got:
        assert sorted(got.namelist()) == sorted(want.namelist())
        names = [name for name in want.namelist() if not name.endswith("/RECORD")]
        assert [name for name in names if got.read(name) != want.read(name)] == []


def modules() -> set[str]:
    """The files of the package as a wheel must name them."""
    code = (path.relative_to(ROOT) for folder in CODE for path in (ROOT / folder).rglob("*.py"))
    names = {f"sparsecast/{path.as_posix()}" for path in code}
    return names - {"sparsecast/cli/entry/__main__.py"} | {"sparsecast/__main__.py"}


def test_the_wheel_runs_as_a_module(built, tmp_path):
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path)
    assert "sparsecast/__main__.py" in names
    assert not [name for name in names if name.endswith("__init__.py") or "entry" in name[:22]]
    assert {name for name in names if name.endswith(".py")} == modules()
    code = "import runpy, sys; sys.path.insert(0, '.'); sys.argv[1:] = ['--version']; "
    code += "runpy.run_module('sparsecast', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == path.name.split("-")[1]
