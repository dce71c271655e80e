"""`sparsecast bench export`: how near exporting is to copying a file of the same size.

    export     `sparsecast export`, in a process of its own: of the function alone, and of the whole
               process with its imports; the bundle's model file is synced
    cp         `cp --reflink=never` of that model file, and a sync
    convert    PowerInfer's convert.py on the same model and predictors, and a sync

Every round runs them in turn, each with its source in the page cache; medians are reported. Rates
count the model file alone. peak_mb is the most anonymous memory seen above that after the imports;
its bound is two of the largest tensor in f32 and 100 MB. A MB is 10^6 bytes.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from sparsecast.cli.bench.export_model import SHAPES, write_random
from sparsecast.cli.bench.export_runs import check_converter, converted, copied, exported, files_of
from sparsecast.core.errors import InputError
from sparsecast.core.files import check_writable_file, write_json
from sparsecast.core.messages import log, show
from sparsecast.core.models.location import resolve_model
from sparsecast.core.options import validate_fields
from sparsecast.core.progress import progress_bar
from sparsecast.export.bundle import SUFFIX
from sparsecast.export.config import ExportDtype
from sparsecast.export.read.reader import GGUFFile

SLACK = 100e6


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
    """PowerInfer's convert.py, in its repository: also time it."""

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


def bench(cfg: BenchExportConfig) -> dict[str, Any]:
    """Run it; rates, memory and ratios, also written to `cfg.json`.

    Raises:
        InputError: Too little space on the disk, a converter that does not start, or a model that
            export refuses.
        BenchError: A run failed.
    """
    if cfg.json is not None:
        check_writable_file(cfg.json, "--json")
    command = [cfg.converter_python, str(cfg.convert)]
    if cfg.convert is not None:
        check_converter(command)
    runs: dict[str, list[float]] = {name: [] for name in ("export", "process", "cp", "convert")}
    growth = []
    with ExitStack() as stack:
        made = tempfile.TemporaryDirectory(prefix="sparsecast-bench-", dir=cfg.folder)
        scratch = Path(stack.enter_context(made))
        model, predictors = _subject(cfg, scratch)
        progress = stack.enter_context(progress_bar("bench", cfg.rounds))
        for _ in range(cfg.rounds):
            ours = exported(str(model), predictors, scratch / "bundle", cfg.dtype)
            (file,) = (scratch / "bundle").glob(f"*{SUFFIX}")
            runs["export"].append(ours.seconds)
            runs["process"].append(ours.process)
            growth.append(ours.growth)
            runs["cp"].append(copied(file, scratch / "copy"))
            if cfg.convert is not None:
                took = converted(command, model, predictors, scratch / "theirs.gguf")
                runs["convert"].append(took)
            progress.advance()
        nbytes = file.stat().st_size
        entries = GGUFFile(file).entries.values()
        bound = 2 * 4 * max(prod(entry.shape) for entry in entries) + SLACK
    seconds = {name: statistics.median(times) for name, times in runs.items() if times}
    theirs = seconds.get("convert")
    values = {
        "model": cfg.model or cfg.shape,
        "dtype": cfg.dtype,
        "mb": nbytes / 1e6,
        "mb_per_s": nbytes / 1e6 / seconds["export"],
        "cp_mb_per_s": nbytes / 1e6 / seconds["cp"],
        "of_cp": seconds["cp"] / seconds["export"],
        "peak_mb": max(growth) / 1e6,
        "bound_mb": bound / 1e6,
        "over_convert": theirs / seconds["process"] if theirs else None,
        "seconds": seconds,
        "runs": runs,
    }
    _show(values)
    if cfg.json is not None:
        write_json(cfg.json, values)
    return values


def _subject(cfg: BenchExportConfig, scratch: Path) -> tuple[Path, Path]:
    """Folders of the model and its predictors."""
    if cfg.model is not None and cfg.predictors is not None:
        model, predictors = resolve_model(cfg.model), cfg.predictors
        sources = sum(path.stat().st_size for path in (*files_of(model), *files_of(predictors)))
        _check_space(scratch, 3 * sources)
        return model, predictors
    shape = SHAPES[cfg.shape]
    # Source, bundle and a copy of it; f32 takes twice the source.
    _check_space(scratch, (5 if cfg.dtype == "f32" else 3) * shape.nbytes)
    model, predictors = scratch / f"random-{cfg.shape}", scratch / "predictors"
    with progress_bar("model", shape.nbytes) as progress:
        write_random(shape, model, predictors, progress.advance)
    return model, predictors


def _check_space(scratch: Path, need: int) -> None:
    if need > (free := shutil.disk_usage(scratch).free):
        raise InputError(
            f"{scratch.parent}: needs {need / 1e6:,.0f} MB, but only {free / 1e6:,.0f} MB are free "
            "there; name another place with --folder"
        )


def _show(values: dict[str, Any]) -> None:
    table = Table(title=f"{values['model']} in {values['dtype']}, {values['mb']:,.0f} MB")
    for name in ("", "MB/s", "seconds", "with the process"):
        table.add_column(name, justify="right" if name else "left")
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
