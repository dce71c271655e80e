"""Refuse what a GPU build or a CPU build of PowerInfer cannot run."""

from __future__ import annotations

from pathlib import Path

from sparsecast.core.errors import InputError
from sparsecast.export.engine.gpu import is_gpu_build


def check_build(main: Path, budgets: list[str] | None) -> None:
    """Refuse budgets for a CPU build, and a GPU build without budgets.

    Raises:
        InputError: The two do not go together.
        EngineError: See `is_gpu_build`.
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


def check_threads(threads: list[int], partial: list[str]) -> None:
    """Refuse one thread where a GPU build aborts with it.

    In a GPU build every FFN that is not whole on the GPU asserts at least two threads, one on the
    CPU alone too (`ggml_get_n_tasks` in ggml.c at d3ebd7c).

    Args:
        partial: Budgets that leave neurons on the CPU.

    Raises:
        InputError: One thread, and such a budget.
    """
    if 1 in threads and partial:
        raise InputError(
            f"--threads 1: a GPU build of PowerInfer aborts with one thread unless the FFN is "
            f"whole on the GPU, and --vram-budget {partial[0]} leaves neurons on the CPU; take "
            "--threads 2 or more, or --vram-budget 100%"
        )
