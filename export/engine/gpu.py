"""Tell whether a PowerInfer build is for GPUs, and read what it says of GPU memory.

The lines are from llama.cpp at d3ebd7c (`llama_gpu_split_loader`, `llm_load_gpu_split`,
`llm_load_sparse_model_tensors`, `llama_kv_cache_init`, `llama_new_context_with_model`):

    offloaded layers from VRAM budget(BYTES bytes): N/LAYERS
                            the budget, and how many layers' attention fits; LAYERS + 1 if the
                            output norm does, the last but the output matrix
    VRAM used: X MB         attention, predictors, norms and output matrix
    loaded gpu_idx, vram_required: BYTES
                            it has read the file of neurons, which needs so much
    failed to apply previously generated gpu split
                            and did not take it: less is left, or its layers are not the model's
    offloaded X MiB of FFN weights to GPU
                            the neurons' rows
    VRAM kv self = X MB     the part of the KV cache on the GPU; no line where it is none
    VRAM scratch buffer: X MB
                            intermediate results, which no budget covers

Its "total VRAM used" counts the rows of whole layers twice: with the model and with the neurons.
A MB is 2^20 bytes.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import NamedTuple

from sparsecast.core.errors import InputError
from sparsecast.export.engine.process import EngineError, last_words, run_to_end
from sparsecast.export.engine.protocol import CHUNK

ONLY_ON_GPU = "--no-mul-mat-q"
"""An option that the help of GPU builds alone lists; every build's has --vram-budget
(`gpt_print_usage` of common.cpp)."""
THREADS = "2"
"""Fewest threads with which a GPU build computes a layer that is not whole on the GPU
(`ggml_get_n_tasks` of ggml.c)."""
SHORT = 32
"""The longest context in which the engine's allocator fails with no batch, whatever the model: it
attends to no fewer cells of the KV cache, so that every graph has the size that was measured."""
MB = 2**20
_NUMBER = r"(\d+(?:\.\d+)?)"
_BUDGET = re.compile(r"offloaded layers from VRAM budget\((\d+) bytes\): (\d+)/(\d+)")
_FIXED = re.compile(rf"(?<!total )VRAM used: {_NUMBER} MB")
_INDEX = re.compile(r"loaded gpu_idx, vram_required: (\d+)")
_NEURONS = re.compile(rf"offloaded {_NUMBER} MiB of FFN weights to GPU")
_CACHE = re.compile(rf"VRAM kv self = {_NUMBER} MB")
_SCRATCH = re.compile(rf"VRAM scratch buffer: {_NUMBER} MB")
REFUSED = "failed to apply previously generated gpu split"


class Told(NamedTuple):
    """What a GPU build said of its memory; None where a line is missing."""

    budget: int | None
    """Bytes that it may use."""
    placed: bool
    """All that comes before the output matrix is on the GPU."""
    fixed: float | None
    """Attention, predictors, norms and output matrix, in MB, to two decimals as all below."""
    needs: int | None
    """Bytes that the file of neurons beside the model says it needs."""
    refused: bool
    """It did not take that file."""
    neurons: float | None
    cache: float
    scratch: float | None

    @property
    def used(self) -> float:
        """MB of weights and KV cache."""
        return (self.fixed or 0.0) + self.cache + (self.neurons or 0.0)


def is_gpu_build(program: Path) -> bool:
    """Ask one of PowerInfer's binaries for its options, which needs no GPU.

    Raises:
        InputError: It is no program of this machine.
        EngineError: It cannot be started, such as a CUDA build without CUDA's libraries.
    """
    with tempfile.TemporaryDirectory() as scratch:
        try:
            code, out, err = run_to_end([str(program), "--help"], scratch)
        except OSError as error:
            raise InputError(
                f"--engine: {program}: cannot be run ({error.strerror or error}), expected a "
                "program of a PowerInfer build; build it on this machine"
            ) from error
    if code and "usage" not in out:
        raise EngineError(f"{program}: cannot be run (exit {code}): {last_words(err)}")
    return ONLY_ON_GPU in out


def gpu_options(gib: float, *, singly: bool = False, split: bool = False) -> tuple[str, ...]:
    """Return the options of a run with `gib` GiB of GPU memory and a float32 KV cache.

    Args:
        singly: One token at a time goes through the model, as when text is generated.
        split: The neurons of a layer are split between GPU and CPU: with `SHORT`, `main` and
            `server` end with a segmentation fault in their CPU product of such a layer.
    """
    batch = 1 if singly else CHUNK
    context = SHORT if singly and not split else CHUNK
    sizes = ("-c", str(context), "-b", str(batch), "--memory-f32", "--vram-budget", f"{gib:.9g}")
    return ("-t", THREADS, "-tb", THREADS, *sizes)


def read_told(output: str) -> Told:
    """Read a binary's output."""
    budget, index = _BUDGET.search(output), _INDEX.search(output)
    return Told(
        budget=None if budget is None else int(budget[1]),
        placed=budget is not None and int(budget[2]) > int(budget[3]),
        fixed=_megabytes(_FIXED, output),
        needs=None if index is None else int(index[1]),
        refused=REFUSED in output,
        neurons=_megabytes(_NEURONS, output),
        cache=_megabytes(_CACHE, output) or 0.0,
        scratch=_megabytes(_SCRATCH, output),
    )


def _megabytes(pattern: re.Pattern[str], output: str) -> float | None:
    found = pattern.search(output)
    return None if found is None else float(found[1])
