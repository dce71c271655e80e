"""Builds of PowerInfer and llama.cpp: which programs, for a CPU or a GPU, of which commit.

PowerInfer's `main` prints `build = NUMBER (COMMIT)` before it opens its model (main.cpp, d3ebd7c),
and lists one option in GPU builds alone (export/engine/gpu.py). llama.cpp's programs print
`version: NUMBER (COMMIT)` for --version, and llama-bench lists devices for --list-devices
(tools/llama-bench/llama-bench.cpp).
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from sparsecast.cli.doctor.finding import Finding, one_line

TESTED = "d3ebd7c"
"""PowerInfer's commit that the exporter and its tests follow."""
PROGRAMS = ("main", "perplexity", "server")
USED_BY = {
    "main": "bench engine",
    "perplexity": "verify --engine",
    "server": "verify --engine",
}
GPU_OPTION = "--no-mul-mat-q"
BUILD = re.compile(r"build = (\S+) \((\w+)\)")
VERSION = re.compile(r"version: (.+)")
DEVICE = re.compile(r"^\s+(\w+\d*): (.+)$", re.MULTILINE)
TIMEOUT = 20


def build_findings(
    engine: Path | None, llama_bench: Path | None, environment: Mapping[str, str]
) -> list[Finding]:
    """Look at the builds that the options name, or else the environment."""
    engine = engine or _named(environment, "POWERINFER_BUILD")
    llama_bench = llama_bench or _named(environment, "LLAMA_CPP_BUILD")
    return [_powerinfer(engine), _llama_cpp(llama_bench)]


def _named(environment: Mapping[str, str], variable: str) -> Path | None:
    value = environment.get(variable)
    return Path(value) if value else None


def find_program(build: Path, name: str) -> Path | None:
    """Find a program in a build folder, in its bin folder, or where Visual Studio puts it."""
    for folder in (build / "bin", build / "bin" / "Release", build):
        for path in (folder / name, folder / f"{name}.exe"):
            if path.is_file() and os.access(path, os.X_OK):
                return path.absolute()
    return None


def _powerinfer(build: Path | None) -> Finding:
    name = "PowerInfer"
    if build is None:
        advice = "name a build by --engine or POWERINFER_BUILD"
        return Finding("engines", name, "note", "no build named", advice)
    found = {program: find_program(build, program) for program in PROGRAMS}
    missing = [program for program, path in found.items() if path is None]
    first = next((path for path in found.values() if path), None)
    if first is None:
        advice = "build it: cmake -S . -B build && cmake --build build, and name that build folder"
        return Finding("engines", name, "fix", f"{build}: no program of PowerInfer there", advice)
    said = _output([str(first), "--help"])
    if "usage" not in said:
        advice = "build it on this machine; a GPU build needs CUDA's libraries"
        return Finding("engines", name, "fix", f"{first} does not run: {_last(said)}", advice)
    kind = "GPU build" if GPU_OPTION in said else "CPU build"
    text = f"{build}: {kind}{_powerinfer_version(found['main'])}"
    values = {"path": str(build), "gpu": kind == "GPU build"}
    if missing:
        needs = "; ".join(f"no {program} ({USED_BY[program]})" for program in missing)
        advice = f"cmake --build {build} --target {' '.join(missing)}"
        return Finding("engines", name, "note", f"{text}; {needs}", advice, values)
    return Finding("engines", name, "ok", text, values=values)


def _powerinfer_version(main: Path | None) -> str:
    if main is None:
        return ""
    found = BUILD.search(_output([str(main), "-m", "no-such-model.gguf"]))
    if found is None:
        return ", of an unknown commit"
    known = found[2].startswith(TESTED) or TESTED.startswith(found[2])
    return f", build {found[1]} ({found[2]})" + ("" if known else f"; tested is {TESTED}")


def _llama_cpp(place: Path | None) -> Finding:
    name = "llama.cpp"
    if place is None:
        advice = "name one by --llama-bench or LLAMA_CPP_BUILD"
        return Finding("engines", name, "note", "no build named", advice)
    bench = find_program(place, "llama-bench") if place.is_dir() else place
    if bench is None or not bench.is_file():
        advice = "build it: cmake -B build && cmake --build build --target llama-bench"
        return Finding("engines", name, "fix", f"{place}: no llama-bench there", advice)
    said = _output([str(bench), "--help"])
    if "usage" not in said:
        advice = "build it on this machine; a GPU build needs its GPU's libraries"
        return Finding("engines", name, "fix", f"{bench} does not run: {_last(said)}", advice)
    if "--list-devices" not in said:
        told = f"{bench}: PowerInfer's own llama-bench, or one too old to list its devices"
        return Finding("engines", name, "note", told, "build a current llama.cpp and name that")
    listed = _output([str(bench), "--list-devices"]).partition("Available devices:")[2]
    devices = [match[1] for match in DEVICE.finditer(listed)]
    gpu = [device for device in devices if device.rstrip("0123456789") not in ("CPU", "BLAS")]
    kind = f"GPU build ({', '.join(gpu)})" if gpu else "CPU build, or no GPU is visible"
    values = {"path": str(bench), "gpu": bool(gpu)}
    return Finding("engines", name, "ok", f"{bench}: {kind}{_llama_version(bench)}", values=values)


def _llama_version(bench: Path) -> str:
    """Ask a program beside llama-bench, which has no --version."""
    for name in ("llama-cli", "llama-server", "llama-perplexity"):
        program = find_program(bench.parent, name)
        if program and (found := VERSION.search(_output([str(program), "--version"]))):
            return f", version {found[1].strip()}"
    return ""


def _output(command: list[str]) -> str:
    """Run a program in a folder of its own; return all that it printed, or why it did not run."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        try:
            done = subprocess.run(
                command,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=TIMEOUT,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return one_line(error)
    return done.stdout.decode(errors="replace")


def _last(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return one_line(lines[-1]) if lines else "it prints nothing"
