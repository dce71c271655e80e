"""The command as a whole: its screen, its JSON, its exit code, and what it must not import."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from sparsecast.cli.doctor import run
from sparsecast.cli.doctor.imports import Imports
from sparsecast.cli.doctor.packages import packages
from sparsecast.cli.doctor.torch_facts import torch_facts
from sparsecast.cli.main import main

PARTS = ["python", "packages", "gpu", "kernels", "compiler", "cpu", "memory", "disk", "engines"]


@pytest.fixture
def imported(monkeypatch) -> Imports:
    """Stands in for the processes that import packages: all work."""
    found = Imports({p.module: None for p in packages()}, torch_facts())
    monkeypatch.setattr(run, "import_all", lambda _: found)
    monkeypatch.delenv("POWERINFER_BUILD", raising=False)
    monkeypatch.delenv("LLAMA_CPP_BUILD", raising=False)
    return found


def doctor(*args: str) -> int:
    with pytest.raises(SystemExit) as done:
        main(["doctor", *args])
    return int(done.value.code or 0)


def test_a_machine_that_works(imported, capsys, tmp_path):
    path = tmp_path / "doctor.json"
    assert doctor("--json", str(path)) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.count("\n") < 40
    assert out.endswith("Everything that every stage needs works.\n")
    told = json.loads(path.read_text())
    assert (told["ok"], told["to_do"]) == (True, [])
    assert list(dict.fromkeys(row["part"] for row in told["findings"])) == [*PARTS, "extras"]
    torch = next(row for row in told["findings"] if row["name"] == "torch")
    assert torch["values"]["version"] == torch["found"]
    assert torch.keys() == {"part", "name", "state", "found", "to_do", "values"}


def test_what_is_broken_is_on_the_list_and_exits_with_1(imported, capsys, tmp_path):
    imported.errors["datasets"] = "RuntimeError: broken"
    path = tmp_path / "doctor.json"
    assert doctor("--engine", str(tmp_path), "--json", str(path)) == 1
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    assert "FIX  datasets" in out
    told = json.loads(path.read_text())
    assert told["ok"] is False
    first, second = told["to_do"]
    assert first == "datasets: pip install --force-reinstall 'datasets>=4'"
    assert second.startswith("PowerInfer: build it")
    assert out.index("To do:\n1. datasets: ") < out.index("\n2. PowerInfer: ")


@pytest.mark.parametrize(
    "name", ["python_finding", "packages", "compiler_finding", "driver", "optional_findings"]
)
def test_a_look_that_fails_is_told_in_a_line(name, imported, monkeypatch, capsys):
    def fail(*_: object) -> None:
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr(run, name, fail)
    doctor()
    assert "RuntimeError: first second" in " ".join(capsys.readouterr().out.split())


def test_a_json_that_cannot_be_written(imported, capsys):
    assert doctor("--json", "/proc/doctor.json") == 2
    assert "--json: /proc/doctor.json cannot be written" in capsys.readouterr().err


ALONE = """
import sys
from importlib.machinery import PathFinder

class Blocked:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names | {"sparsecast"} and "finder" not in top:
            raise ImportError(f"{top} is blocked")

sys.meta_path.insert(0, Blocked())
from sparsecast.cli.doctor import run
from sparsecast.cli.doctor.imports import Imports
run.import_all = lambda groups: Imports()
from sparsecast.cli.main import main
main(["doctor", *sys.argv[1:]])
"""


@pytest.mark.parametrize("args", [[], ["--help"]])
def test_it_works_with_no_package_at_all(args):
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *args], capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    if args:
        assert "--llama-bench PATH" in done.stdout
    else:
        assert done.returncode == 1
        assert "pip install packaging" in done.stdout


def test_other_commands_point_here_when_a_package_is_missing():
    code = ALONE.replace('"doctor", ', '"inspect", "x", ')
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "is blocked; `sparsecast doctor` says what is missing or broken" in done.stderr


@pytest.mark.slow
def test_this_environment_works(capsys):
    assert doctor() == 0, capsys.readouterr().out
    assert "FIX" not in capsys.readouterr().out
