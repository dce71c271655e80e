"""The runs of `sparsecast bench export`: ours in its own process, `cp`, PowerInfer's converter.

All begin with the source in the page cache and nothing of ours left to write, and all end when
their bytes are on the disk.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from threading import Event, Thread
from typing import NamedTuple

from sparsecast.core.errors import InputError
from sparsecast.export.engine.process import last_words

PERIOD = 0.005
"""Seconds between two looks at a process's memory."""


class Exported(NamedTuple):
    """One export."""

    seconds: float
    """Seconds of `export` alone."""
    process: float
    """Seconds of its process, imports included."""
    growth: int
    """Peak anonymous memory in bytes, above that after the imports."""


class BenchError(RuntimeError):
    """A run failed; the text is the end of its output."""


def anonymous(process: str) -> int:
    """Bytes of resident anonymous memory (RssAnon) of a process of Linux; 0 once it has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text("ascii", "replace")
    except OSError:
        return 0
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    return 1024 * int(found[1]) if found else 0


def exported(model: str, predictors: Path, out: Path, dtype: str) -> Exported:
    """Run `export` into `out`, which is replaced."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "sparsecast.cli.bench.export_child"]
    command += [model, str(predictors), str(out), dtype]
    _settle([*files_of(Path(model)), *files_of(predictors)])
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as p:
        assert p.stdout is not None
        base, peak, done = p.stdout.readline(), [0], Event()
        watcher = Thread(target=_watch, args=(str(p.pid), peak, done))
        watcher.start()
        end, errors = p.communicate()
        process = time.perf_counter() - start
        done.set()
        watcher.join()
    if p.returncode:
        raise BenchError(f"the export failed: {last_words(errors)}")
    seconds, growth = json.loads(end)["seconds"], peak[0] - json.loads(base)["base"]
    return Exported(seconds, process, max(growth, 0))


def _watch(process: str, peak: list[int], done: Event) -> None:
    while not done.wait(PERIOD):
        peak[0] = max(peak[0], anonymous(process))


def copied(source: Path, target: Path) -> float:
    """Seconds of `cp --reflink=never` and a sync of the copy, which is removed."""
    _settle([source])
    start = time.perf_counter()
    subprocess.run(["cp", "--reflink=never", source, target], check=True)
    _sync(target)
    seconds = time.perf_counter() - start
    target.unlink()
    return seconds


def converted(command: list[str], model: Path, predictors: Path, target: Path) -> float:
    """Seconds of PowerInfer's converter and a sync of its file, which is removed.

    Args:
        command: A Python and the path of convert.py.
    """
    _settle([*files_of(model), *files_of(predictors)])
    options = ["--outtype", "f16", "--outfile", str(target), str(model), str(predictors)]
    start = time.perf_counter()
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    # It exits with 0 after some failures.
    if done.returncode or not target.is_file():
        raise BenchError(f"convert.py wrote no file: {last_words(done.stderr)}")
    _sync(target)
    seconds = time.perf_counter() - start
    target.unlink()
    return seconds


def check_converter(command: list[str]) -> None:
    """Refuse a Python that cannot run convert.py."""
    try:
        done = subprocess.run([*command, "--help"], capture_output=True, text=True, check=False)
        code, words = done.returncode, last_words(done.stderr)
    except OSError as error:
        code, words = 1, str(error)
    if code:
        raise InputError(
            f"--convert: `{' '.join(command)} --help` fails ({words}); expected PowerInfer's "
            "convert.py and a --converter-python with sentencepiece and a numpy below 2, such as "
            "`python3 -m venv v && v/bin/pip install 'numpy<2' sentencepiece` gives"
        )


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _settle(sources: list[Path]) -> None:
    """What earlier runs wrote is on the disk, and the sources are in the page cache."""
    if hasattr(os, "sync"):
        os.sync()
    buffer = bytearray(2**24)
    for path in sources:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
