"""Start the processes of `sparsecast bench scaling` through torchrun, and read what they say."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sparsecast.core.files import read_json
from sparsecast.export.engine.process import last_words

GRACE = 40
"""Seconds for torchrun to end its processes; it gives them 30."""


class RunError(RuntimeError):
    """A run failed; the text says why in one line."""


class Result(NamedTuple):
    """What the processes of one run say together."""

    rates: list[float]
    """Of every round: work per second until the last process is done."""
    peaks: list[int]
    """Bytes of every process."""


def run_processes(count: int, arguments: Sequence[str], threads: int) -> Result:
    """Run `scaling_rank` in as many processes, which have ended when this returns or raises.

    Args:
        arguments: Of `scaling_rank.main`, without its folder.
        threads: CPU threads of each.

    Raises:
        RunError: A process failed.
    """
    with tempfile.TemporaryDirectory(prefix="sparsecast-bench-") as name:
        folder = Path(name)
        output = folder / "output.txt"
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        module = ["-m", "sparsecast.cli.bench.scaling_rank", *arguments, name]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        with output.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, *launcher, *module],
                stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment,
            )  # fmt: skip
            try:
                code = process.wait()
            finally:
                _end(process)
        if code:
            raise RunError(_reason(folder, output))
        return _result([read_json(path, "a result") for path in sorted(folder.glob("rank-*.json"))])


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a launcher that still runs, and with it its processes."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _reason(folder: Path, output: Path) -> str:
    """Return what the first process that failed has said, else the end of all output."""
    told = sorted(folder.glob("error-*.txt"), key=lambda path: path.stat().st_mtime_ns)
    text = (told[0] if told else output).read_text(encoding="utf-8", errors="replace")
    return last_words(text)


def _result(ranks: Sequence[dict[str, Any]]) -> Result:
    seconds = [rank["seconds"] for rank in ranks]
    amount = ranks[0]["amount"]
    rates = [amount / max(of_round) for of_round in zip(*seconds, strict=True)]
    return Result(rates, [rank["peak_bytes"] for rank in ranks])
