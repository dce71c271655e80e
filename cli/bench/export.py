"""`sparsecast bench export`: the speed of export compared to copying a file of the same size.

    export     `sparsecast export` in a process of its own, which syncs the bundle's model file;
               both the function and the whole process with its imports are timed
    cp         `cp --reflink=never` of that model file, and a sync
    convert    PowerInfer's convert.py on the same model and predictors, and a sync

Every round runs them in turn, each with its source in the page cache; medians are reported. Rates
count only the bytes of the model file. peak_mb is the largest anonymous memory seen, less what the
imports take; its bound is twice the largest tensor in f32, plus 100 MB. 1 MB is 10^6 bytes.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

from sparsecast.cli.bench.export_model import SHAPES, write_random
from sparsecast.cli.bench.export_runs import check_converter, converted, copied, exported, files_of
from sparsecast.cli.bench.results import check_json, new_table, publish
from sparsecast.cli.bench.rounds import medians
from sparsecast.core.errors import InputError
from sparsecast.core.hub import local_folder
from sparsecast.core.messages import log, show
from sparsecast.core.models.location import resolve_model
from sparsecast.core.options import validate_fields
from sparsecast.core.progress import progress_bar
from sparsecast.export.bundle import SUFFIX
from sparsecast.export.config import ExportDtype
from sparsecast.export.read.reader import GGUFFile

SLACK = 100e6
"""Bytes of memory allowed beyond two of the largest tensor."""


@dataclass(frozen=True, kw_only=True)
class BenchExportConfig:
    """Time export against cp, and against PowerInfer's converter."""

    shape: Literal["tiny", "1b"] = "1b"
    """tiny or 1b: a llama with random weights in bf16 and random predictors."""

    model: str | None = None
    """Hugging Face id or folder; unset: random weights of --shape."""

    predictors: Path | None = None
    """Predictors of --model."""

    dtype: ExportDtype = "f16"
    """f16, f32 or q4_0, as for export."""

    convert: Path | None = None
    """Path of PowerInfer's convert.py, to time it too."""

    converter_python: str = "python3"
    """Python that runs --convert; it needs sentencepiece and a numpy below 2."""

    rounds: int = 3
    """Timed rounds."""

    folder: Path | None = None
    """Where to write; unset: a temporary folder."""

    json: Path | None = None
    """Write the numbers to this file."""

    def __post_init__(self) -> None:
        validate_fields(self, rounds=1)
        if sys.platform != "linux":
            raise InputError("bench export: measures memory through /proc, which only Linux has")
        if (self.model is None) != (self.predictors is None):
            raise InputError("--model and --predictors: give both, or neither for --shape")
        if self.convert is not None and self.dtype != "f16":
            raise InputError(f"--convert: writes f16, so --dtype {self.dtype} cannot be compared")


def bench_export(cfg: BenchExportConfig) -> dict[str, Any]:
    """Rates, memory and ratios.

    Raises:
        InputError: Too little space on the disk, a converter that does not start, or a model that
            export refuses.
        BenchError: A run failed.
    """
    check_json(cfg.json)
    command = [cfg.converter_python, str(cfg.convert)]
    if cfg.convert is not None:
        check_converter(command)
    runs: dict[str, list[float]] = {name: [] for name in ("export", "process", "cp", "convert")}
    growth = []
    with ExitStack() as stack:
        temporary = tempfile.TemporaryDirectory(prefix="sparsecast-bench-", dir=cfg.folder)
        scratch = Path(stack.enter_context(temporary))
        model, predictors = _sources(cfg, scratch)
        progress = stack.enter_context(progress_bar("bench", cfg.rounds))
        for _ in range(cfg.rounds):
            export = exported(str(model), predictors, scratch / "bundle", cfg.dtype)
            (file,) = (scratch / "bundle").glob(f"*{SUFFIX}")
            runs["export"].append(export.seconds)
            runs["process"].append(export.process)
            growth.append(export.growth)
            runs["cp"].append(copied(file, scratch / "copy"))
            if cfg.convert is not None:
                took = converted(command, model, predictors, scratch / "theirs.gguf")
                runs["convert"].append(took)
            progress.advance()
        nbytes = file.stat().st_size
        entries = GGUFFile(file).entries.values()
        bound = 2 * 4 * max(prod(entry.shape) for entry in entries) + SLACK
    seconds = medians(runs)
    converter = seconds.get("convert")
    values = {
        "model": cfg.model or cfg.shape,
        "dtype": cfg.dtype,
        "mb": nbytes / 1e6,
        "mb_per_s": nbytes / 1e6 / seconds["export"],
        "cp_mb_per_s": nbytes / 1e6 / seconds["cp"],
        "of_cp": seconds["cp"] / seconds["export"],
        "peak_mb": max(growth) / 1e6,
        "bound_mb": bound / 1e6,
        "over_convert": converter / seconds["process"] if converter else None,
        "seconds": seconds,
        "runs": runs,
    }
    return publish(values, cfg.json, _show)


def _sources(cfg: BenchExportConfig, scratch: Path) -> tuple[Path, Path]:
    """The folders of the model and its predictors; random ones are written to `scratch`."""
    if cfg.model is not None and cfg.predictors is not None:
        model, predictors = resolve_model(cfg.model), local_folder(cfg.predictors, "predictors")
        sources = sum(path.stat().st_size for path in (*files_of(model), *files_of(predictors)))
        _check_space(scratch, 3 * sources)
        return model, predictors
    shape = SHAPES[cfg.shape]
    # The source, the bundle and a copy of the bundle; in f32 a bundle is twice the source.
    _check_space(scratch, (5 if cfg.dtype == "f32" else 3) * shape.nbytes)
    model, predictors = scratch / f"random-{cfg.shape}", scratch / "predictors"
    with progress_bar("model", shape.nbytes) as progress:
        write_random(shape, model, predictors, progress.advance)
    return model, predictors


def _check_space(scratch: Path, need: int) -> None:
    if need > (free := shutil.disk_usage(scratch).free):
        raise InputError(
            f"{scratch.parent}: needs {need / 1e6:,.0f} MB, but only {free / 1e6:,.0f} MB are free "
            "there; choose another place with --folder"
        )


def _show(values: dict[str, Any]) -> None:
    title = f"{values['model']} in {values['dtype']}, {values['mb']:,.0f} MB"
    table = new_table("", "MB/s", "seconds", "with the process", title=title)
    seconds = values["seconds"]
    rates = (("export", values["mb_per_s"]), ("cp", values["cp_mb_per_s"]))
    for name, rate in rates:
        process = f"{seconds['process']:.2f}" if name == "export" else ""
        table.add_row(name, f"{rate:,.0f}", f"{seconds[name]:.2f}", process)
    if "convert" in seconds:
        table.add_row("convert.py", "", "", f"{seconds['convert']:.2f}")
    show(table)
    log.info(
        f"export at {values['of_cp']:.1%} of cp; anonymous memory grew by {values['peak_mb']:,.0f} "
        f"MB (bound {values['bound_mb']:,.0f})"
    )
