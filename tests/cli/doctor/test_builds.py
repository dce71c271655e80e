"""Builds of the engines, from programs that say what the real ones say."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sparsecast.cli.doctor.builds import build_findings

MAIN = """#!/bin/sh
case "$1" in
--help) echo "usage: main [options]"; {gpu} ;;
-m) echo "Log start"; echo "main: build = 1590 ({commit})" >&2; exit 1 ;;
esac
"""
BENCH = """#!/bin/sh
case "$1" in
--help) echo "usage: llama-bench [options]"; echo "  --list-devices  list and exit" ;;
--list-devices) echo "  Noise: of the driver" >&2; echo "Available devices:"; {devices} ;;
esac
"""
CLI = """#!/bin/sh
echo "version: 6123 (abc1234)" >&2
"""


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def powerinfer(folder: Path, *, gpu: str = ":", commit: str = "d3ebd7c") -> Path:
    for name in ("main", "perplexity", "server"):
        program(folder / "bin" / name, MAIN.format(gpu=gpu, commit=commit))
    return folder


def test_no_build_is_named():
    for finding in build_findings(None, None, {}):
        assert (finding.state, finding.found) == ("note", "no build named")


def test_cpu_and_gpu_builds_of_powerinfer(tmp_path):
    cpu, gpu = powerinfer(tmp_path / "c"), powerinfer(tmp_path / "g", gpu="echo --no-mul-mat-q")
    first, _ = build_findings(cpu, None, {"POWERINFER_BUILD": str(gpu)})
    assert (first.state, first.found) == ("ok", f"{cpu}: CPU build, build 1590 (d3ebd7c)")
    assert first.values["gpu"] is False
    second, _ = build_findings(None, None, {"POWERINFER_BUILD": str(gpu)})
    assert (second.state, second.found) == ("ok", f"{gpu}: GPU build, build 1590 (d3ebd7c)")


def test_another_commit_and_programs_that_are_missing(tmp_path):
    build = powerinfer(tmp_path, commit="0123abc")
    (build / "bin" / "server").unlink()
    found, _ = build_findings(build, None, {})
    assert found.state == "note"
    assert "(0123abc); tested is d3ebd7c; no server (verify --engine)" in found.found
    assert found.to_do == f"cmake --build {build} --target server"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("#!/bin/sh\necho 'libcublas.so.12: cannot open' >&2\nexit 127\n", "libcublas.so.12: can"),
        ("#!/no/such/shell\n", "No such file"),
        ("not a program", "Exec format error"),
        ("#!/bin/sh\n", "it prints nothing"),
    ],
)
def test_programs_that_do_not_run(text, words, tmp_path):
    program(tmp_path / "main", text)
    program(tmp_path / "llama-bench", text)
    for finding in build_findings(tmp_path, tmp_path, {}):
        assert finding.state == "fix"
        assert "does not run" in finding.found
        assert words in finding.found


def test_what_is_named_and_not_there(tmp_path):
    for place in (tmp_path, tmp_path / "nowhere"):
        for finding in build_findings(place, place, {}):
            assert finding.state == "fix"
            assert finding.found.startswith(f"{place}: no")


def test_llama_cpp_by_file_and_folder(tmp_path):
    devices = "echo '  CUDA0: NVIDIA H200 (143167 MiB, 142000 MiB free)'; echo '  BLAS: x'"
    bench = program(tmp_path / "bin" / "llama-bench", BENCH.format(devices=devices))
    program(tmp_path / "bin" / "llama-cli", CLI)
    for place in (bench, tmp_path, tmp_path / "bin"):
        _, found = build_findings(None, place, {})
        assert (found.state, found.found) == (
            "ok",
            f"{bench}: GPU build (CUDA0), version 6123 (abc1234)",
        )


def test_a_llama_bench_that_lists_no_devices(tmp_path):
    program(tmp_path / "llama-bench", "#!/bin/sh\necho 'usage: llama-bench [options]'\n")
    _, found = build_findings(None, tmp_path, {})
    assert found.state == "note"
    assert "PowerInfer's own llama-bench, or one too old" in found.found


def test_llama_cpp_of_a_cpu(tmp_path):
    program(tmp_path / "llama-bench", BENCH.format(devices=":"))
    _, found = build_findings(None, None, {"LLAMA_CPP_BUILD": str(tmp_path)})
    assert found.found == f"{tmp_path / 'llama-bench'}: CPU build, or no GPU is visible"


@pytest.mark.engine
@pytest.mark.skipif("POWERINFER_BUILD" not in os.environ, reason="no PowerInfer build is named")
def test_a_real_build():
    found, _ = build_findings(None, None, os.environ)
    assert found.state == "ok"
    assert "(d3ebd7c)" in found.found
