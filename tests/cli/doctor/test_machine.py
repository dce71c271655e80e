"""Memory, disk and the compiler, on systems that lack something."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest

from sparsecast.cli.doctor import machine
from sparsecast.cli.doctor.machine import (
    compiler_finding,
    cpu_finding,
    disk_findings,
    memory_bytes,
    memory_finding,
)


def test_memory_is_what_the_kernel_says():
    total, free = memory_bytes()
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    assert total == pytest.approx(int(lines["MemTotal"].split()[0]) * 1024, rel=0.01)
    assert free is not None
    assert 0 < free < total


def test_a_system_that_does_not_tell_its_memory(monkeypatch):
    monkeypatch.delattr(os, "sysconf")
    assert memory_bytes() == (None, None)
    assert memory_finding().state == "note"


@pytest.mark.parametrize(
    ("text", "limit", "words"),
    [
        ("1073741824\n", 2**30, "; this container may use 1 GiB"),
        ("max\n", None, "available"),
        ("9223372036854771712\n", 9223372036854771712, "available"),
    ],
)
def test_the_memory_of_a_container(text, limit, words, tmp_path, monkeypatch):
    (tmp_path / "limit").write_text(text)
    monkeypatch.setattr(machine, "LIMITS", (tmp_path / "none", tmp_path / "limit"))
    found = memory_finding()
    assert found.values["limit_bytes"] == limit
    assert found.found.endswith(words)


def test_cores_without_an_affinity(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3}, raising=False)
    assert cpu_finding(1).found == ("8 cores, of which this process may use 2; torch uses 1 thread")
    monkeypatch.delattr(os, "sched_getaffinity")
    assert cpu_finding(None).found == "8 cores"


def test_folders_that_cannot_be_written(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "gone"))
    here, temporary = disk_findings()
    assert here.state in ("ok", "note")
    assert (temporary.state, temporary.to_do) == ("fix", "set TMPDIR to a folder of yours")

    def none() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    _, temporary = disk_findings()
    assert temporary.state == "fix"


def test_a_disk_that_is_nearly_full(monkeypatch):
    usage = type("usage", (), {"free": 2**30})
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: usage)
    here, _ = disk_findings()
    assert (here.state, here.values["free_bytes"]) == ("note", 2**30)


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    def write(text: str) -> None:
        path = tmp_path / "c++"
        path.write_text(text)
        path.chmod(0o755)
        monkeypatch.setenv("CXX", f"{path} -O0")

    return write


@pytest.mark.parametrize(
    ("text", "state", "found", "to_do"),
    [
        ("#!/bin/sh\nexit 0\n", "ok", "compiles with Python's headers", ""),
        (
            "#!/bin/sh\necho 'fatal error: Python.h: No such file or directory' >&2\nexit 1\n",
            "note",
            "has no Python.h",
            f"python{sys.version_info.major}.{sys.version_info.minor}-dev",
        ),
        ("#!/bin/sh\nexit 1\n", "note", "fails (no message)", "install g++"),
        ("#!/no/such/shell\n", "note", "cannot be run", "install g++"),
    ],
)
def test_compilers(text, state, found, to_do, compiler):
    compiler(text)
    finding = compiler_finding()
    assert finding.state == state
    assert found in finding.found
    assert to_do in (finding.to_do or "")


def test_no_compiler_at_all(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    finding = compiler_finding()
    assert (finding.state, finding.found.split(";")[0]) == ("note", "no g++")
    monkeypatch.setenv("CXX", "")
    assert compiler_finding().found.startswith("CXX is empty")
