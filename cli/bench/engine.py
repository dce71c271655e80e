"""`sparsecast bench engine`: tokens per second of PowerInfer's engine on a bundle.

    llama.cpp    with --llama-bench: the same model without predictors by llama.cpp, the baseline
                 of PowerInfer's paper
    dense        the same model without predictors, as a plain GGUF of the same types (see
                 export/write/dense.py); not for falcon, whose dense graph reads a tensor that the
                 engine does not load
    all active   the bundle's file with a threshold below every logit
    predictors   the bundle as it is

There is one row of each per number of threads and, on a GPU build, per budget of GPU memory
(engine_budgets.py). All generate the same number of tokens, in turn, round by round: PowerInfer
from the same prompt of a word, llama-bench from an empty context. Reported are medians of the
programs' own timing of generation. With several threads only the speed means something:
PowerInfer's CPU down projection adds the threads' partial sums without a lock.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sparsecast.cli.bench.engine_bandwidth import copy_gb_per_s
from sparsecast.cli.bench.engine_budgets import GPUPlan, check_budget, counts_of, plan_gpu
from sparsecast.cli.bench.engine_build import check_build, check_threads
from sparsecast.cli.bench.engine_bytes import predicts
from sparsecast.cli.bench.engine_machine import check_cores, check_scratch, warn_of_memory
from sparsecast.cli.bench.engine_rows import Bundle, DenseModel, Labelled, Programs, Row, rows_at
from sparsecast.cli.bench.engine_shape import write_bundles
from sparsecast.cli.bench.engine_table import row_values, show_table
from sparsecast.cli.bench.results import check_json, publish
from sparsecast.cli.bench.rounds import in_rounds
from sparsecast.core.errors import InputError
from sparsecast.core.messages import log
from sparsecast.core.options import validate_fields
from sparsecast.export.bundle import bundle_file
from sparsecast.export.checks.metadata import check_metadata
from sparsecast.export.engine.process import EngineError, binary
from sparsecast.export.read.reader import GGUFFile
from sparsecast.export.write.dense import write_dense
from sparsecast.integrations.llama_cpp.llama_bench import find_llama_bench
from sparsecast.predictors.manifest import read_manifest

LLAMA_CPP = {"llama": "llama", "bamboo": "llama", "falcon": "falcon"}
"""A bundle's architecture to llama.cpp's of the same tensors; llama.cpp has no OPT."""


@dataclass(frozen=True, kw_only=True)
class BenchEngineConfig:
    """Time PowerInfer's engine with predictors, with every neuron active, and dense."""

    bundle: Path | None = None
    """Folder written by `sparsecast export`; unset: random weights of --shape."""

    shape: Literal["1b", "7b", "13b"] | None = None
    """Without a bundle: a model of the shape of MiniCPM-S-1B, Llama 2 7B or 13B, once with
    predictors that are as good as the published ones and once with ours."""

    dtype: Literal["f16", "q4_0"] = "f16"
    """Of --shape: f16 or q4_0 weights. The public recipe's predictors are f16, ours q4_0."""

    engine: Path
    """Build folder of PowerInfer (or its bin folder)."""

    tokens: int = 200
    """Tokens to generate in every run."""

    rounds: int = 5
    """Runs of each row."""

    threads: list[int] = field(default_factory=lambda: [1])
    """CPU threads of the engine; several make rows for each."""

    vram_budget: list[str] | None = None
    """For a GPU build: GPU memory in GiB as PowerInfer takes it, such as 3.5, or the share of the
    FFN's neurons to place there beside everything that comes first, such as 50%; several make
    rows for each."""

    llama_bench: Path | None = None
    """llama-bench of a llama.cpp build, or that build's folder: also time the dense model by
    llama.cpp, with the same types, threads, budgets and number of tokens."""

    json: Path | None = None
    """Write the numbers to this file."""

    def __post_init__(self) -> None:
        validate_fields(self, tokens=2, rounds=1, threads=1)
        if (self.bundle is None) == (self.shape is None):
            raise InputError("--bundle, --shape: give one of them")
        if self.bundle is not None and self.dtype != "f16":
            raise InputError(f"--dtype {self.dtype}: is for --shape; a bundle has its own types")
        for name in ("threads", "vram_budget"):
            values = getattr(self, name) or []
            if len(set(values)) < len(values):
                raise InputError(f"--{name.replace('_', '-')}: names a value twice, got {values}")
        for budget in self.vram_budget or []:
            check_budget(budget)


def bench_engine(cfg: BenchEngineConfig) -> dict[str, Any]:
    """Time `cfg.bundle`, or the random bundles of `cfg.shape`; see `bench_bundles`.

    Raises:
        InputError: See `bench_bundles` and `write_bundles`.
    """
    if cfg.bundle is not None:
        return bench_bundles([Labelled(str(cfg.bundle), cfg.bundle)], cfg)
    assert cfg.shape is not None
    _check_before(cfg)
    shares = [budget for budget in cfg.vram_budget or [] if budget.endswith("%")]
    check_threads(cfg.threads, [share for share in shares if float(share[:-1]) < 100])
    with tempfile.TemporaryDirectory(prefix="sparsecast-shape-") as scratch:
        made = write_bundles(cfg.shape, cfg.dtype, Path(scratch))
        about = {
            "shape": cfg.shape,
            "dtype": cfg.dtype,
            "points": made.points,
            "bundles": dict.fromkeys(made.points),  # their folders are gone at the end
        }
        return bench_bundles(made.bundles, cfg, about)


def bench_bundles(
    bundles: list[Labelled], cfg: BenchEngineConfig, about: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Time bundles of one model that differ in their predictors alone, and its dense form.

    Disk: a dense file as large as the model, in a temporary folder; for a bamboo and llama.cpp two.
    Memory: 1 GiB for the copy bandwidth, then what the engine takes.

    Args:
        bundles: The first is also timed with everything active, and its weights are the dense
            model's. A share of neurons in --vram-budget becomes GiB for each by itself; the dense
            model has those of the first.
        cfg: Everything but what the bundles are.
        about: Keys of the JSON about the bundles, in place of its own.

    Returns:
        The JSON, see docs/file-formats.md.

    Raises:
        InputError: No bundle or no engine there, bundles of several models, a budget or number of
            threads that the engine cannot run, or too little disk; see also `write_dense` and
            `dense_rate`.
        EngineError: The engine or llama-bench failed. If only some rows did, the others are shown
            and written to `cfg.json` first.
    """
    if len({bundle.label for bundle in bundles}) < len(bundles):
        raise InputError(f"bundles: two have one label: {[bundle.label for bundle in bundles]}")
    main, llama_bench = _check_before(cfg)
    files = [_read(bundle.folder) for bundle in bundles]
    _check_one_model(files)
    with tempfile.TemporaryDirectory(prefix="sparsecast-bench-") as scratch:
        programs = Programs(main, llama_bench, cfg.tokens, scratch)
        timed = [
            Bundle(i, bundle.label, file, _predicted(bundle, file), _plans(cfg, file, programs))
            for i, (bundle, file) in enumerate(zip(bundles, files, strict=True))
        ]
        plans = [plan for bundle in timed for plan in bundle.plans if plan is not None]
        check_threads(cfg.threads, [plan.asked for plan in plans if not plan.whole])
        dense = _dense_model(files[0], programs)
        warn_of_memory([*dense.paths, *(file.path for file in files)])
        budgets = range(len(timed[0].plans))
        rows = [
            row
            for t in cfg.threads
            for b in budgets
            for row in rows_at(programs, dense, timed, t, b)
        ]
        copy = {t: copy_gb_per_s(t) for t in cfg.threads}
        rates = in_rounds({str(i): row.rate for i, row in enumerate(rows)}, cfg.rounds)
    failed = [row.error for row in rows if row.error is not None]
    if len(failed) == len(rows):
        raise EngineError(failed[0])
    values = {**_values(cfg, bundles, rows, list(rates.values()), copy), **(about or {})}
    publish(values, cfg.json, show_table)
    if failed:
        raise EngineError(f"{len(failed)} of {len(rows)} rows failed, the first with: {failed[0]}")
    return values


def _check_before(cfg: BenchEngineConfig) -> tuple[Path, Path | None]:
    """Check what needs no bundle; return PowerInfer's `main` and llama-bench."""
    check_json(cfg.json)
    check_cores(cfg.threads)
    main = binary(cfg.engine, "main")
    llama_bench = None if cfg.llama_bench is None else find_llama_bench(cfg.llama_bench)
    check_build(main, cfg.vram_budget)
    return main, llama_bench


def _read(folder: Path) -> GGUFFile:
    file = GGUFFile(bundle_file(folder))
    if not (metadata := check_metadata(file)).ok:
        raise InputError(f"{file.path}: {metadata.detail}; export it again")
    return file


def _check_one_model(files: list[GGUFFile]) -> None:
    """Refuse bundles whose dense tensors differ in shape or type, which cannot share a baseline."""

    def dense(file: GGUFFile) -> dict[str, Any]:
        kept = {n: e for n, e in file.entries.items() if not predicts(n)}
        arch = {"": file.keys["general.architecture"]}
        return arch | {name: (entry.shape, entry.type.name) for name, entry in kept.items()}

    for other in files[1:]:
        if dense(other) != dense(files[0]):
            raise InputError(
                f"{other.path}: has other weights than {files[0].path}, expected the same model in "
                "the same types with other predictors; time them one by one"
            )


def _predicted(bundle: Labelled, file: GGUFFile) -> float | None:
    if bundle.predicted_sparsity is not None:
        return bundle.predicted_sparsity
    folder = file.path.parent / "predictor"
    if (manifest := read_manifest(folder)) is None:
        log.warning(
            f"{folder}: no manifest, which has the predicted sparsity; bytes per token with "
            "predictors are left out"
        )
        return None
    scores = [layer["predicted_sparsity"] for layer in manifest.calibration]
    return sum(scores) / len(scores)


def _plans(cfg: BenchEngineConfig, file: GGUFFile, programs: Programs) -> list[GPUPlan | None]:
    if cfg.vram_budget is None:
        return [None]
    counts = counts_of(file)
    return [plan_gpu(budget, file, counts, programs.context) for budget in cfg.vram_budget]


def _dense_model(file: GGUFFile, programs: Programs) -> DenseModel:
    """Write the dense files; the engines share one where the architecture has one name."""
    arch = str(file.keys["general.architecture"])
    powerinfer = None if arch == "falcon" else Path(programs.scratch, f"{arch}-dense.gguf")
    llama_cpp = None
    if programs.llama_bench is not None:
        if arch not in LLAMA_CPP:
            raise InputError(
                f"--llama-bench: {file.path} is of the architecture {arch!r}, which llama.cpp does "
                "not have; leave the option out"
            )
        llama_cpp = Path(programs.scratch, f"{LLAMA_CPP[arch]}-dense.gguf")
    dense = DenseModel(file, powerinfer, llama_cpp)
    need = len(dense.paths) * sum(e.nbytes for n, e in file.entries.items() if not predicts(n))
    check_scratch(Path(programs.scratch), need, f"{file.path}: its dense form")
    for path in dense.paths:
        write_dense(file, path, LLAMA_CPP[arch] if path == llama_cpp else None)
    return dense


def _values(
    cfg: BenchEngineConfig,
    bundles: list[Labelled],
    rows: list[Row],
    rates: list[list[float]],
    copy: dict[int, float],
) -> dict[str, Any]:
    builds = {row.last.build for row in rows if row.last is not None and row.last.build is not None}
    return {
        "bundles": {bundle.label: str(bundle.folder) for bundle in bundles},
        "tokens": cfg.tokens,
        "gpu": cfg.vram_budget is not None,
        "llama_cpp_build": ", ".join(sorted(builds)) or None,
        "copy_gb_per_s": {str(threads): rate for threads, rate in copy.items()},
        "rows": row_values(rows, rates, copy),
    }
