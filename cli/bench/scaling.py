"""`sparsecast bench scaling`: the stages that share work, on one, two, four, ... processes.

For every stage and number of processes torchrun starts that many, each on a GPU of its own or on
the CPU, with random weights of one shape. They do the stage's own work for some rounds and end. The
work of a round is the same for every number of processes (strong scaling). A round ends when its
last process does, behind everything on the devices.

    speedup     rate over that of the fewest processes
    of linear   speedup over what as many times the processes could give at best
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from sparsecast.cli.bench.results import check_json, new_table, publish
from sparsecast.cli.bench.rounds import device_name
from sparsecast.cli.bench.scaling_launch import Result, RunError, run_processes
from sparsecast.cli.bench.scaling_work import SHAPES, STEPS, UNITS
from sparsecast.core.errors import InputError
from sparsecast.core.machine import usable_cores
from sparsecast.core.messages import log, show
from sparsecast.core.models.loading import pick_device
from sparsecast.core.options import validate_fields
from sparsecast.core.progress import progress_bar


@dataclass(frozen=True, kw_only=True)
class BenchScalingConfig:
    """Time collect, train and sparsify on several numbers of processes."""

    stages: list[Literal["collect", "train", "sparsify"]] = field(
        default_factory=lambda: ["collect", "train", "sparsify"]
    )
    """Stages to time."""

    shape: Literal["tiny", "1b", "7b"] = "tiny"
    """tiny (7M parameters), 1b (MiniCPM-S-1B's) or 7b (Llama 2 7B's), with random weights."""

    processes: list[int] = field(default_factory=lambda: [1, 2])
    """Numbers of processes, each on a GPU or core of its own."""

    steps: int = 2
    """Training steps of sparsify in a round; train takes 10 times as many, and collect 4 times as
    many batches, times the least common multiple of --processes."""

    rounds: int = 3
    """Timed rounds, behind a warm-up."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto, cpu or cuda."""

    json: Path | None = None
    """Write the numbers to this file."""

    def __post_init__(self) -> None:
        validate_fields(self, processes=1, steps=1, rounds=1)
        for name in ("stages", "processes"):
            if len(set(given := getattr(self, name))) < len(given):
                raise InputError(f"--{name}: got {given}, expected each once")
        for count in self.processes:
            _check_shares(self, count)


def bench_scaling(cfg: BenchScalingConfig) -> dict[str, Any]:
    """Rates and memory by stage and number of processes.

    Memory: in each process that of its share of the stage; this one holds none of it.

    Raises:
        InputError: More processes than GPUs, or than cores on a CPU.
        RunError: Some runs failed; the others are shown and written to `cfg.json` first.
    """
    check_json(cfg.json)
    device = pick_device(cfg.device)
    _check_machine(cfg, device)
    counts = sorted(cfg.processes)
    threads = max(1, usable_cores() // counts[-1])
    rows = []
    with progress_bar("bench", len(cfg.stages) * len(counts)) as progress:
        for stage in cfg.stages:
            of_stage: list[dict[str, Any]] = []
            for count in counts:
                found = _run(cfg, stage, count, device.type, threads)
                of_stage.append({"stage": stage, "processes": count, **found})
                progress.advance()
            rows += with_shares(of_stage)
    values = {
        "shape": cfg.shape,
        "device": device_name(device) if device.type == "cuda" else "CPU",
        "threads": threads,
        "steps": cfg.steps,
        "rounds": cfg.rounds,
        "torch": torch.__version__,
        "rows": rows,
    }
    publish(values, cfg.json, _show)
    if failed := [row for row in rows if row["error"] is not None]:
        first = failed[0]
        raise RunError(
            f"{len(failed)} of {len(rows)} runs failed, the first {first['stage']} with "
            f"{first['processes']} processes: {first['error']}"
        )
    return values


def _check_shares(cfg: BenchScalingConfig, count: int) -> None:
    """Raise `InputError` if a stage cannot share its work among so many processes."""
    sizes = SHAPES[cfg.shape]
    if "train" in cfg.stages and count > (layers := sizes.model.layers):
        raise InputError(
            f"--processes: got {count}, but train shares {layers} layers of {cfg.shape}; expected "
            "at most one process for each, or other --stages"
        )
    if "sparsify" in cfg.stages and sizes.step_sequences % count:
        raise InputError(
            f"--processes: got {count}, but sparsify shares {sizes.step_sequences} sequences of a "
            "step equally; expected a divisor of that, or other --stages"
        )


def _check_machine(cfg: BenchScalingConfig, device: torch.device) -> None:
    on_gpu, most = device.type == "cuda", max(cfg.processes)
    there = torch.cuda.device_count() if on_gpu else usable_cores()
    if most > there:
        what = "GPU" if on_gpu else "core"
        raise InputError(
            f"--processes: got {most}, but this machine has {there} {what}{'s' * (there > 1)}; "
            "expected at most one process for each"
        )


def _run(
    cfg: BenchScalingConfig, stage: str, count: int, device: str, threads: int
) -> dict[str, Any]:
    """Time one stage on one number of processes; a failure is told under `error`."""
    steps = cfg.steps * STEPS[stage]
    if stage == "collect":  # as many batches for each process, whatever their number
        steps *= math.lcm(*cfg.processes)
    found, error = Result([], []), None
    try:
        arguments = [stage, cfg.shape, str(cfg.rounds), str(steps), device]
        found = run_processes(count, arguments, threads)
    except RunError as failure:
        error = str(failure)
    return {
        "rate": statistics.median(found.rates) if error is None else None,
        "unit": UNITS[stage],
        "peak_bytes": max(found.peaks, default=None),
        "runs": found.rates,
        "error": error,
    }


def with_shares(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add `speedup` and `of_linear` to the rows of one stage, relative to the first that ran."""
    base = next((row for row in rows if row["rate"] is not None), None)
    made = []
    for row in rows:
        speedup = of_linear = None
        if base is not None and row["rate"] is not None:
            speedup = row["rate"] / base["rate"]
            of_linear = speedup * base["processes"] / row["processes"]
        made.append({**row, "speedup": speedup, "of_linear": of_linear})
    return made


def _show(values: dict[str, Any]) -> None:
    title = f"{values['shape']}, {values['device']}, {values['threads']} CPU threads a process"
    columns = ("processes", "rate", "speedup", "of linear", "GiB each")
    table = new_table("", *columns, title=title)
    for row in values["rows"]:
        if row["error"] is not None:
            table.add_row(row["stage"], str(row["processes"]), "failed")
            continue
        table.add_row(
            row["stage"],
            str(row["processes"]),
            f"{row['rate']:,.0f}",
            f"{row['speedup']:.2f}",
            f"{row['of_linear']:.1%}",
            f"{row['peak_bytes'] / 2**30:.2f}",
        )
    show(table)
    log.info(
        "rates are tokens/s, of train token-layers/s; a round is the same work for every number "
        "of processes"
    )
