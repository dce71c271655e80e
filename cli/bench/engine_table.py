"""The numbers of `sparsecast bench engine` as JSON and as a table."""

from __future__ import annotations

import math
import statistics
from typing import Any

from sparsecast.cli.bench.engine_rows import Row
from sparsecast.cli.bench.results import new_table
from sparsecast.core.messages import log, show

NAMES = {
    "llama_cpp": "llama.cpp",
    "dense": "dense",
    "all_active": "all active",
    "predictors": "predictors",
}
BASELINES = {"all_active": "everything active", "dense": "dense", "llama_cpp": "llama.cpp"}
OFF = 0.05
"""Share by which the engine's GPU memory may differ from the plan without a warning."""


def row_values(
    rows: list[Row], rates: list[list[float]], copy: dict[int, float]
) -> list[dict[str, Any]]:
    """Return the rows of the JSON.

    Args:
        rates: Per row, tokens per second of each round; NaN from a failure on.
        copy: Copy bandwidth by number of threads, in 10^9 bytes per second.
    """
    found = [_row(row, runs, copy) for row, runs in zip(rows, rates, strict=True)]
    medians = {(_place(row), row["kind"]): row["tokens_per_s"] for row in found}
    for row in found:
        for kind in BASELINES:
            row[f"over_{kind}"] = _ratio(row["tokens_per_s"], medians.get((_place(row), kind)))
    return found


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else above / below


def _place(row: dict[str, Any]) -> tuple[int, str | None]:
    return row["threads"], row["vram_budget"]


def _row(row: Row, runs: list[float], copy: dict[int, float]) -> dict[str, Any]:
    runs = [rate for rate in runs if not math.isnan(rate)]
    rate = statistics.median(runs) if row.error is None else None
    plan, read = row.plan, row.bytes
    sparse = plan is not None and row.ngl is None
    return {
        "kind": row.kind,
        "label": row.label,
        "threads": row.threads,
        "vram_budget": None if plan is None else plan.asked,
        "vram_gib": None if plan is None else plan.gib,
        "tokens_per_s": rate,
        "host_bytes_per_token": None if read is None else read.host,
        "gpu_bytes_per_token": None if read is None else read.gpu,
        "of_copy_bandwidth": rate * read.total / copy[row.threads] / 1e9
        if rate is not None and read is not None and plan is None
        else None,
        "gpu_layers": row.ngl,
        "gpu_neurons": plan.neurons if plan is not None and sparse else None,
        "vram_planned": plan.bytes if plan is not None and sparse else None,
        "vram_used": None if row.last is None else row.last.used,
        "vram_scratch": None if row.last is None else row.last.scratch,
        "runs": runs,
        "error": row.error,
    }


def show_table(values: dict[str, Any]) -> None:
    """Show the table, on a GPU build a second one of its memory, and the fastest row in words."""
    rows, gpu = values["rows"], values["gpu"]
    beside = values["llama_cpp_build"] is not None
    several = len(values["bundles"]) > 1
    columns = ["threads", *(["budget"] if gpu else []), "tokens/s", "times dense"]
    columns += ["times llama.cpp"] if beside else []
    columns += [] if gpu else ["MB/token", "of copy bandwidth"]
    title = f"PowerInfer, {values['tokens']} tokens" + ", beside llama.cpp dense" * beside
    table = new_table("", *columns, title=title)
    for row in rows:
        table.add_row(_name(row, several), *_speed(row, gpu, beside))
    show(table)
    if gpu:
        _show_memory(rows, several)
    copy = ", ".join(f"{rate:,.1f} GB/s with {t}" for t, rate in values["copy_gb_per_s"].items())
    log.info(f"copying within host memory, bytes read and written, by threads: {copy}")
    _tell_fastest(rows, several)
    for row in rows:
        if row["error"] is not None:
            log.error(f"{_name(row, several)}, {_where(row)}: {row['error']}")
        _warn_of_memory(row, several)


def _name(row: dict[str, Any], several: bool) -> str:
    name = NAMES[row["kind"]]
    return f"{name}: {row['label']}" if several and row["label"] is not None else name


def _speed(row: dict[str, Any], gpu: bool, beside: bool) -> list[str]:
    cells = [str(row["threads"]), *([row["vram_budget"]] if gpu else [])]
    rate = "failed" if row["error"] is not None else f"{row['tokens_per_s']:,.1f}"
    cells += [rate, _shown(row["over_dense"], "{:.2f}")]
    cells += [_shown(row["over_llama_cpp"], "{:.2f}")] if beside else []
    if gpu:
        return cells
    read = _shown(row["host_bytes_per_token"], "{:,.1f}", 1e-6)
    return [*cells, read, _shown(row["of_copy_bandwidth"], "{:.0%}")]


def _show_memory(rows: list[dict[str, Any]], several: bool) -> None:
    """Show what each row reads and places, which the number of threads does not change."""
    columns = ("MB from CPU", "MB from GPU", "on GPU", "MiB used", "planned")
    title = "Weights read per token, and GPU memory"
    table = new_table("", "budget", *columns, title=title)
    for row in rows:
        if row["threads"] != rows[0]["threads"]:
            continue
        cells = [_shown(row[f"{p}_bytes_per_token"], "{:,.1f}", 1e-6) for p in ("host", "gpu")]
        layers = row["gpu_layers"]
        cells.append(_shown(row["gpu_neurons"], "{:.0%}") if layers is None else f"-ngl {layers}")
        cells += [_shown(row[f"vram_{p}"], "{:,.1f}", 2**-20) for p in ("used", "planned")]
        table.add_row(_name(row, several), row["vram_budget"], *cells)
    show(table)


def _shown(value: float | None, form: str, scale: float = 1) -> str:
    return "-" if value is None else form.format(value * scale)


def _where(row: dict[str, Any]) -> str:
    budget = "" if row["vram_budget"] is None else f", --vram-budget {row['vram_budget']}"
    return f"{row['threads']} thread(s){budget}"


def _tell_fastest(rows: list[dict[str, Any]], several: bool) -> None:
    found = [row for row in rows if row["kind"] == "predictors" and row["error"] is None]
    best = max(found, key=lambda row: row["tokens_per_s"], default={})
    times = [
        f"{best[f'over_{kind}']:.2f} times {name}"
        for kind, name in BASELINES.items()
        if best.get(f"over_{kind}") is not None
    ]
    if not times:
        return
    told = f"with predictors {', '.join(times)}"
    if len(found) > 1:
        label = f"{best['label']}, " if several else ""
        told = f"fastest ({label}{_where(best)}): {told}"
    log.info(told)


def _warn_of_memory(row: dict[str, Any], several: bool) -> None:
    used, planned = row["vram_used"], row["vram_planned"]
    if used is None or planned is None or abs(used - planned) <= OFF * planned:
        return
    log.warning(
        f"{_name(row, several)}, {_where(row)}: the engine put {used / 2**20:,.1f} MiB on the GPU, "
        f"{planned / 2**20:,.1f} were planned"
    )
