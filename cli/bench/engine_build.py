"""Tell a GPU build of PowerInfer from a CPU build, and what neither can run."""

from __future__ import annotations

import tempfile
from pathlib import Path

from sparsecast.cli.bench.engine_budgets import GPUPlan
from sparsecast.core.errors import InputError
from sparsecast.export.engine.process import EngineError, last_words, run_to_end

CUDA_OPTION = "--no-mul-mat-q"
"""An option that `main --help` lists in a CUDA or ROCm build alone; it lists --vram-budget in every
build (common/common.cpp at d3ebd7c)."""


def is_gpu_build(main: Path) -> bool:
    """Ask PowerInfer's `main` for its options.

    Raises:
        EngineError: It cannot be started, such as a CUDA build without CUDA's libraries.
    """
    with tempfile.TemporaryDirectory() as scratch:
        code, out, err = run_to_end([str(main), "--help"], scratch)
    if code and "usage" not in out:
        raise EngineError(f"{main}: cannot be run (exit {code}): {last_words(err)}")
    return CUDA_OPTION in out


def check_build(main: Path, budgets: list[str] | None) -> None:
    """Refuse budgets for a CPU build, and a GPU build without budgets.

    Raises:
        InputError: The two do not go together.
    """
    gpu = is_gpu_build(main)
    if budgets is not None and not gpu:
        raise InputError(
            f"--vram-budget: {main} is a CPU build of PowerInfer, which ignores budgets; build it "
            "with -DLLAMA_CUBLAS=ON, or leave the option out"
        )
    if budgets is None and gpu:
        raise InputError(
            f"--engine: {main} is a GPU build of PowerInfer, which takes all GPU memory that is "
            "free unless told; give --vram-budget, such as 0,50%,100%, or name a CPU build"
        )


def check_threads(threads: list[int], plans: list[GPUPlan | None]) -> None:
    """Refuse one thread where a GPU build aborts with it.

    In a GPU build every FFN that is not whole on the GPU asserts at least two threads, one on the
    CPU alone too (`ggml_get_n_tasks` in ggml.c at d3ebd7c).

    Raises:
        InputError: One thread, and a budget that leaves neurons on the CPU.
    """
    split = [plan.asked for plan in plans if plan is not None and not plan.whole]
    if 1 in threads and split:
        raise InputError(
            f"--threads 1: a GPU build of PowerInfer aborts with one thread unless the FFN is "
            f"whole on the GPU, and --vram-budget {split[0]} leaves neurons on the CPU; take "
            "--threads 2 or more, or --vram-budget 100%"
        )
