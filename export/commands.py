"""The command lines with which a bundle runs, and what makes the engine abort."""

from __future__ import annotations

import numpy as np

from sparsecast.export.plan import ExportPlan
from sparsecast.export.write.hot_cold import Split

GIB = 2**30
FEWEST_CELLS = 32
"""The engine attends to no fewer cells of the KV cache (`llama_decode_internal`)."""
SPACE_NOTE = (
    " The text begins with a space: `main` adds none, and the model was trained with one there."
)


def run_notes(plan: ExportPlan) -> list[str]:
    """Say how to run the bundle, as Markdown paragraphs: on a CPU, and with counts on a GPU."""
    pieces = plan.vocabulary.model == "llama"
    text = f'-n 64 --temp 0 --repeat-penalty 1.0 -p "{" " if pieces else ""}..."'
    parts = [
        "On a CPU:",
        f"```\nmain -m {plan.file} -t 1 {text}\n```",
        "`main` is PowerInfer's binary. Use one thread: its CPU down projection adds the threads' "
        "partial sums without a lock, so with more threads results change from run to run."
        + (SPACE_NOTE if pieces else ""),
        batch_note(plan),
    ]
    if plan.counts is None:
        return parts
    return [
        *parts,
        "With a GPU build:",
        f"```\nmain -m {plan.file} {' '.join(gpu_arguments(plan))} {text}\n```",
        _gpu_note(plan),
    ]


def gpu_arguments(plan: ExportPlan) -> list[str]:
    """Return the options of a GPU run with the budget and context that were planned for."""
    if plan.gpu is None:
        return ["-t 2 -tb 2"]
    return ["-t 2 -tb 2", f"--vram-budget {plan.gpu.gib:.9g}", f"-c {plan.gpu.context}"]


def batch_note(plan: ExportPlan) -> str:
    """Say which batches the engine's allocator fails with (docs/powerinfer.md has the trials)."""
    size = max(plan.hparams.head_dim, FEWEST_CELLS)
    return (
        "Leave `-b`, the tokens that go through the model at once, at its default of 512, or give "
        f"more than {size}. With `-b` of {size} or less and `-c` of more than {size} the engine "
        "can abort with `not enough space in the buffer`."
    )


def least_budget(split: Split) -> float:
    """Return the least --vram-budget, in GiB rounded up to four digits, that takes the split."""
    budget = split.budget
    cache = budget.given - budget.before - budget.room
    need = (budget.before + cache + split.nbytes) / GIB
    digits = 3 - int(np.floor(np.log10(need)))
    return float(np.ceil(need * 10.0**digits) / 10.0**digits)


def _gpu_note(plan: ExportPlan) -> str:
    parts = []
    split = plan.split
    if split is None:
        parts.append(
            "Without `--vram-budget G` (GiB) it takes all free GPU memory but 256 MiB, and runs "
            "its own Python solver to choose neurons: install PowerInfer's `requirements.txt`, or "
            "export with `--vram-budget`."
        )
    elif split.neurons:
        parts.append(
            f"The chosen neurons take at least `--vram-budget {least_budget(split):.4g}`; with "
            "less it runs its own solver, whose file replaces the one here."
        )
    if split is not None and split.neurons == split.width * len(split.hot):
        parts.append("Every layer is whole on the GPU, so one thread is enough.")
    else:
        parts.append(
            "With one thread it aborts at a layer that is not whole on the GPU (`n_threads must be "
            "> 1`)."
        )
    if split is not None and plan.dtype == "q4_0" and split.partial:
        parts.append(
            "With q4_0 weights its kernel for one token clears values of neurons that fire where a "
            "layer is split between GPU and CPU (by its source, not seen in a run): export in f16, "
            "or with a budget for all neurons or none."
        )
    lower = "lower it" if split is None else "export again with a lower one"
    parts.append(
        "Its buffer for intermediate results, and what CUDA itself takes, come on top of the "
        f"budget: if memory runs out, {lower}. `-ngl` is refused."
    )
    return " ".join(parts)
