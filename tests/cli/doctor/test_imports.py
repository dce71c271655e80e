"""Packages that fail in every way, each told in a line; those behind them are still tried."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsecast.cli.doctor import imports
from sparsecast.cli.doctor.imports import import_all, split_groups

MODULES = {
    "good": 'print(\'{"name": "bad", "done": true}\')',
    "raises": "raise RuntimeError('first\\nsecond')",
    "leaves": "import sys; sys.exit('no')",
    "lacks": "import nowhere_at_all",
    "stops": "raise KeyboardInterrupt",
    "crashes": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "vanishes": "import os; os._exit(3)",
    "after": "",
}


@pytest.fixture
def broken(tmp_path, monkeypatch) -> Path:
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def test_each_failure_is_one_line(broken):
    found = import_all([list(MODULES), ["good"]])
    assert found.errors == {
        "good": None,
        "raises": "RuntimeError: first second",
        "leaves": "SystemExit: no",
        "lacks": "ModuleNotFoundError: No module named 'nowhere_at_all'",
        "stops": "KeyboardInterrupt: KeyboardInterrupt",
        "crashes": "ended Python (signal 11)",
        "vanishes": "ended Python (exit code 3)",
        "after": None,
    }


def test_a_torch_that_is_broken_is_told_in_a_line(broken):
    (broken / "torch.py").write_text("raise OSError('libcudart.so is missing')")
    assert import_all([["--torch"]]).torch == {"error": "OSError: libcudart.so is missing"}
    (broken / "torch.py").write_text("import os; os._exit(4)")
    found = import_all([["--torch", "after"]])
    assert found.torch == {"error": "ended Python (exit code 4)"}
    assert found.errors == {"after": None}


def test_files_of_the_current_folder_are_not_taken_for_packages(broken, monkeypatch):
    monkeypatch.delenv("PYTHONPATH")
    monkeypatch.chdir(broken)
    assert import_all([["good"]]).errors["good"].startswith("ModuleNotFoundError")


def test_an_import_that_hangs_ends(broken, monkeypatch):
    (broken / "hangs.py").write_text("import time; time.sleep(60)")
    monkeypatch.setattr(imports, "TIMEOUT", 1)
    assert import_all([["hangs"]]).errors == {"hangs": "took more than 1 s to import"}


def test_a_python_that_does_not_start(monkeypatch):
    monkeypatch.setattr("sys.executable", "/no/such/python")
    found = import_all([["good", "after"], ["--torch"]])
    assert set(found.errors) == {"good", "after"}
    assert "Python could not be started" in found.errors["after"]
    assert "Python could not be started" in found.torch["error"]


def test_groups_hold_every_module_once_but_lightning():
    groups = split_groups(["torch", "lightning", "numpy", "triton"])
    assert groups == [["torch", "triton", "--torch"], ["numpy"]]
