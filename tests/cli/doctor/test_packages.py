"""Installed versions against ranges, and the row of a package that does not work."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError

import pytest

from sparsecast.cli.doctor import packages as module
from sparsecast.cli.doctor.imports import Imports
from sparsecast.cli.doctor.package_findings import package_findings
from sparsecast.cli.doctor.packages import Package, packages, python_finding, unmet


@pytest.fixture
def installed(monkeypatch):
    """Stand in for the metadata: requirements of packages, and versions."""

    def install(requirements: dict[str, list[str]], versions: dict[str, str]) -> None:
        def version(name: str) -> str:
            if name not in versions:
                raise PackageNotFoundError(name)
            return versions[name]

        monkeypatch.setattr(module, "requires", requirements.get)
        monkeypatch.setattr(module, "version", version)

    return install


@pytest.mark.parametrize(
    ("wanted", "found", "fit"),
    [
        ("torch<2.14,>=2.9", "2.13.0+cpu", "fits"),
        ("torch<2.14,>=2.9", "2.9.0", "fits"),
        ("torch<2.14,>=2.9", "2.8.1+cu128", "too old"),
        ("torch<2.14,>=2.9", "2.14.0", "too new"),
        ("torch<2.14,>=2.9", "2.14.0.dev20260101", "too new"),
        ("torch<2.14,>=2.9", "2.10.0rc2", "fits"),
        ("torch>=2.9", "2.10", "fits"),
        ("torch==2.9.*", "2.10", "too new"),
        ("torch==2.9", "2.8", "too old"),
        ("torch>2.9", "2.9", "too old"),
        ("torch", "0.1", "fits"),
        ("torch>=2.9", "of my own", "unknown"),
        ("torch>=2.9", None, "missing"),
    ],
)
def test_a_version_fits_or_is_too_old_or_too_new(installed, wanted, found, fit):
    installed({"sparsecast": [wanted]}, {} if found is None else {"torch": found})
    (one,) = packages()
    assert (one.name, one.found, one.fit) == ("torch", found, fit)


def test_extras_and_other_systems_are_told_apart(installed):
    asked = [
        "numpy>=2",
        'cupy>=1; platform_system == "Amiga"',
        'ruff>=1; extra == "dev"',
        "Scikit_Learn",
    ]
    installed({"sparsecast": asked}, {})
    assert [p.name for p in packages()] == ["numpy", "scikit-learn"]
    assert [p.module for p in packages()] == ["numpy", "sklearn"]
    assert [p.name for p in packages("dev")] == ["ruff"]


def test_what_a_package_itself_needs(installed):
    installed({"lightning": ["torch<2", "torchmetrics>1"]}, {"torch": "1.9"})
    assert unmet("lightning") == "needs torchmetrics>1, which is missing"
    installed({"lightning": ["torch<2", "torchmetrics>1"]}, {"torch": "2.1", "torchmetrics": "2"})
    assert unmet("lightning") == "needs torch<2, but 2.1 is installed"
    installed({}, {})
    assert unmet("lightning") is None


def test_this_installation_fits():
    assert {p.name: p.fit for p in packages() if p.fit != "fits"} == {}
    assert python_finding().state == "ok"


def test_a_python_that_is_too_old_is_named(monkeypatch):
    monkeypatch.setattr("platform.python_version", lambda: "3.10.2")
    found = python_finding()
    assert found.state == "fix"
    assert "3.10.2, expected >=3.11" in found.found


def row(package: Package, error: str | None = None, gpus: tuple[str, ...] = ()):
    (found,) = package_findings([package], Imports({package.module: error}, {"gpus": gpus}))
    return found


def test_rows_of_packages(installed):
    installed({}, {})
    good = Package("no-such", ">=1", "1.5", "fits")
    assert row(good).state == "ok"
    broken = row(good, "OSError: libx.so is gone")
    assert broken.state == "fix"
    assert "1.5 cannot be imported: OSError: libx.so is gone" in broken.found
    assert broken.to_do == "pip install --force-reinstall 'no-such>=1'"
    old = row(Package("no-such", ">=1", "0.5", "too old"))
    assert (old.state, old.found) == ("fix", "0.5 is too old, expected >=1")
    assert old.to_do == "pip install 'no-such>=1'"


def test_triton_is_needed_on_a_gpu_alone():
    missing = Package("triton", ">=3.5", None, "missing")
    assert row(missing).state == "note"
    assert row(missing, gpus=("H200",)).state == "fix"
