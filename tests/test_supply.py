"""The lock file covers what pyproject.toml asks for, CI uses it, and licences are listed."""

from __future__ import annotations

import importlib.util
import tomllib
from email.message import Message
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements" / "test.lock"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
JOBS = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8"))["jobs"]


def locked() -> dict[str, str]:
    lines = [line for line in LOCK.read_text("utf-8").splitlines() if not line.startswith("#")]
    assert all(line.count("==") == 1 for line in lines)
    return dict(line.split("==") for line in lines)


def asked() -> list[Requirement]:
    lines = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
    return [Requirement(line) for line in lines]


@pytest.mark.parametrize("wanted", asked(), ids=lambda r: r.name)
def test_the_lock_holds_a_version_of_each_dependency_that_fits(wanted):
    version = locked().get(canonicalize_name(wanted.name))
    assert version is not None, f"{wanted.name}: run `make lock`"
    assert wanted.specifier.contains(version), f"{wanted}: {version} is locked; run `make lock`"


def test_the_lock_has_no_version_of_one_machine():
    assert [version for version in locked().values() if "+" in version] == []
    assert list(locked()) == sorted(locked())


def test_every_licence_is_named_and_none_is_copyleft():
    text = (ROOT / "docs" / "licences.md").read_text("utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    found = dict(rows[1:])
    assert found.keys() == locked().keys(), "run `make lock`"
    assert [name for name, licence in found.items() if "GPL" in licence] == []
    assert [name for name, licence in found.items() if "not named" in licence] == []


def test_ci_installs_by_the_lock_and_audits_it():
    def text(job: str) -> str:
        return yaml.safe_dump(JOBS[job])

    assert "PIP_CONSTRAINT: ${{ github.workspace }}/requirements/test.lock" in text("test")
    assert "pip-audit --requirement requirements/test.lock" in text("audit")
    pythons = JOBS["test"]["strategy"]["matrix"]["python"]
    classifiers = [c for c in PROJECT["classifiers"] if "Python :: 3." in c]
    assert [c.rpartition(" ")[2] for c in classifiers] == pythons


class Installed:
    """A distribution as importlib.metadata gives it."""

    def __init__(self, version: str, requires: list[str] | None = None, **fields: str) -> None:
        self.version = version
        self.requires = requires
        self.metadata = Message()
        for name, value in fields.items():
            self.metadata[name.replace("_", "-")] = value


@pytest.fixture
def make_lock(monkeypatch):
    """The script, on an environment of four packages."""
    path = ROOT / "requirements" / "make_lock.py"
    spec = importlib.util.spec_from_file_location("make_lock", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    lines = ["torch>=2", 'amiga>=1; sys_platform == "amiga"', 'ruff>=1; extra == "dev"']
    there = {
        "sparsecast": Installed("1", [*lines, 'mkdocs; extra == "docs"', "Fs_Spec[http]>=1"]),
        "torch": Installed("2.9.0+cpu", License_Expression="BSD-3-Clause"),
        "ruff": Installed("1.5", Classifier="License :: OSI Approved :: MIT License"),
        "fs-spec": Installed("3.0", ['aio; extra == "http"', 'gcs; extra == "gcs"']),
        "aio": Installed("4", License="Apache 2.0\nand all of its text"),
        "unrelated": Installed("9"),
    }
    monkeypatch.setattr(script, "distribution", there.__getitem__)
    return script


def test_the_lock_follows_what_is_asked_for(make_lock):
    text = make_lock.lock(make_lock.installed())
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert lines == ["aio==4", "fs-spec==3.0", "ruff==1.5", "torch==2.9.0"]


def test_licences_are_read_from_every_kind_of_metadata(make_lock):
    rows = make_lock.licences(make_lock.installed()).splitlines()[-4:]
    assert rows == [
        "| aio | Apache 2.0 |",
        "| fs-spec | not named in its metadata |",
        "| ruff | MIT License |",
        "| torch | BSD-3-Clause |",
    ]
