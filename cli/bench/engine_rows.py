"""The rows of `sparsecast bench engine`: commands, and what each run of them says."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from sparsecast.cli.bench.engine_budgets import (
    NO_LAYERS,
    DenseLayers,
    GPUPlan,
    llama_cpp_layers,
    powerinfer_layers,
)
from sparsecast.cli.bench.engine_bytes import Bytes, dense_bytes, sparse_bytes
from sparsecast.cli.bench.engine_log import Run, read_run
from sparsecast.export.engine.offload import link_with_split
from sparsecast.export.engine.process import EngineError, run_to_end
from sparsecast.export.read.reader import GGUFFile
from sparsecast.integrations.llama_cpp.llama_bench import dense_rate

PROMPT = " def"


class Labelled(NamedTuple):
    """A bundle and its name in the table."""

    label: str
    folder: Path
    predicted_sparsity: float | None = None
    """Share of neurons that its predictors leave out, for the bytes per token; unset: the mean of
    the layers' calibration scores in its predictor folder."""


class Bundle(NamedTuple):
    """A bundle that is timed."""

    number: int
    label: str
    file: GGUFFile
    predicted_sparsity: float | None
    plans: list[GPUPlan | None]
    """One per budget; one None for a CPU build."""


class DenseModel(NamedTuple):
    """The baseline that all bundles share."""

    file: GGUFFile
    """The bundle it was made of."""
    powerinfer: Path | None
    """Its dense GGUF; None where PowerInfer has no dense graph."""
    llama_cpp: Path | None
    """The same for llama.cpp; None without --llama-bench."""

    @property
    def paths(self) -> list[Path]:
        """Its files, each once."""
        return list({path: None for path in (self.powerinfer, self.llama_cpp) if path is not None})


class Programs(NamedTuple):
    """What runs the rows, and how."""

    main: Path
    llama_bench: Path | None
    tokens: int
    scratch: str

    @property
    def context(self) -> int:
        """The -c, and the -b, which must be as large for the engine's allocator."""
        return max(512, -(-(self.tokens + 32) // 256) * 256)


@dataclass
class Row:
    """One row of the table."""

    kind: str
    """llama_cpp, dense, all_active or predictors."""
    label: str | None
    """The bundle's; None where it is the shared dense model."""
    threads: int
    plan: GPUPlan | None
    bytes: Bytes | None
    """Read per token; None where the predicted sparsity or the place of the weights is unknown."""
    ngl: int | None
    run: Callable[[], Run]
    last: Run | None = None
    error: str | None = None
    """Why a run failed; the others of the row are then left out."""

    def rate(self) -> float:
        """Run once; tokens per second, NaN where this or an earlier run failed."""
        if self.error is not None:
            return math.nan
        try:
            self.last = self.run()
        except EngineError as error:
            self.error = str(error)
            return math.nan
        return self.last.tokens_per_s


def rows_at(
    programs: Programs, dense: DenseModel, bundles: list[Bundle], threads: int, budget: int
) -> list[Row]:
    """Return the rows of one number of threads and one budget.

    Args:
        budget: Index of the budget in the bundles' plans.
    """
    first = bundles[0].plans[budget]
    rows = _dense_rows(programs, dense, threads, first)
    rows.append(_sparse_row(programs, bundles[0], threads, budget, all_active=True))
    return rows + [_sparse_row(programs, b, threads, budget, all_active=False) for b in bundles]


def _dense_rows(
    programs: Programs, dense: DenseModel, threads: int, plan: GPUPlan | None
) -> list[Row]:
    rows = []
    given = None if plan is None else plan.split.budget.given
    if programs.llama_bench is not None and dense.llama_cpp is not None:
        context = -(-programs.tokens // 256) * 256
        layers = NO_LAYERS if given is None else llama_cpp_layers(dense.file, given, context)
        program = (programs.llama_bench, dense.llama_cpp, programs.tokens, threads)
        run = partial(_llama_cpp, *program, programs.scratch, layers.ngl)
        rows.append(_dense_row("llama_cpp", dense.file, threads, plan, layers, run))
    if dense.powerinfer is not None:
        layers, gpu = NO_LAYERS, list[str]()
        if given is not None:
            layers = powerinfer_layers(dense.file, given, programs.context)
            gpu = ["-ngl", str(layers.ngl)]
        command = _command(programs, dense.powerinfer, threads, gpu)
        run = partial(_powerinfer, programs, command, all_active=False)
        rows.append(_dense_row("dense", dense.file, threads, plan, layers, run))
    return rows


def _dense_row(
    kind: str,
    file: GGUFFile,
    threads: int,
    plan: GPUPlan | None,
    layers: DenseLayers,
    run: Callable[[], Run],
) -> Row:
    ngl = None if plan is None else layers.ngl
    return Row(kind, None, threads, plan, dense_bytes(file, layers.on_gpu), ngl, run)


def _sparse_row(
    programs: Programs, bundle: Bundle, threads: int, budget: int, *, all_active: bool
) -> Row:
    plan = bundle.plans[budget]
    model, gpu = bundle.file.path.absolute(), list[str]()
    if plan is not None:
        folder = Path(programs.scratch, f"{bundle.number}-{budget}")
        model = folder / model.name
        if not folder.exists():
            folder.mkdir()
            link_with_split(bundle.file.path, plan.split, folder)
        gpu = ["--vram-budget", f"{plan.gib:.9g}"]
    command = _command(programs, model, threads, gpu)
    run = partial(_powerinfer, programs, command, all_active=all_active)
    kind = "all_active" if all_active else "predictors"
    read = _bytes(bundle, plan, all_active=all_active)
    return Row(kind, bundle.label, threads, plan, read, None, run)


def _bytes(bundle: Bundle, plan: GPUPlan | None, *, all_active: bool) -> Bytes | None:
    if (sparsity := 0.0 if all_active else bundle.predicted_sparsity) is None:
        return None
    if plan is None:
        return sparse_bytes(bundle.file, 1 - sparsity, fixed_on_gpu=False, ffn_on_gpu=0)
    if plan.bytes is None:
        return None
    share = plan.neurons if all_active else plan.split.share
    fixed = plan.fixed
    return sparse_bytes(bundle.file, 1 - sparsity, fixed_on_gpu=fixed, ffn_on_gpu=share)


def _command(programs: Programs, model: Path, threads: int, gpu: list[str]) -> list[str]:
    t, context, tokens = str(threads), str(programs.context), str(programs.tokens)
    options = ["-t", t, "-tb", t, "-c", context, "-b", context, "-n", tokens, *gpu]
    command = [str(programs.main), "-m", str(model), *options, "-p", PROMPT, "--temp", "0"]
    return [*command, "--repeat-penalty", "1.0", "--ignore-eos", "--log-disable", "--simple-io"]


def _powerinfer(programs: Programs, command: list[str], *, all_active: bool) -> Run:
    code, _, err = run_to_end(command, programs.scratch, all_active=all_active)
    return read_run(code, err)


def _llama_cpp(
    program: Path, model: Path, tokens: int, threads: int, scratch: str, ngl: int
) -> Run:
    rate, build = dense_rate(program, model, tokens, threads, scratch, ngl)
    return Run(rate, None, None, build)
