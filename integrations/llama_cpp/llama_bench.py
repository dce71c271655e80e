"""Decode speed by llama.cpp's `llama-bench`, a binary that the user names.

`llama-bench -p 0 -n N -r 1 -o json` loads a GGUF, decodes a token to warm up, then decodes N tokens
from an empty context, and prints a list with one object, in which `avg_ts` is tokens per second.
PowerInfer's build has an older program of that name; the key `backends`, which it lacks, tells them
apart. (llama.cpp b11434, tools/llama-bench/llama-bench.cpp.)
"""

from __future__ import annotations

import os
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

from sparsecast.core.errors import InputError
from sparsecast.core.files import parse_json
from sparsecast.export.engine.process import EngineError, last_words, run_to_end

NAME = "llama-bench"
WANT = "llama-bench of a llama.cpp build"
CPU_BACKENDS = ("CPU", "BLAS", "OpenBLAS", "BLIS", "zDNN", "RPC")
"""Backends that need no GPU."""


class DenseRate(NamedTuple):
    """What one run of llama-bench says."""

    tokens_per_s: float
    build: str
    """Its build's number and commit."""


def find_llama_bench(path: Path) -> Path:
    """Return the absolute path of the program; `path` may also be a build folder or its bin folder.

    Raises:
        InputError: Nothing there that can be executed.
    """
    places = (path / "bin" / NAME, path / NAME) if path.is_dir() else (path,)
    for place in places:
        if place.is_file() and os.access(place, os.X_OK):
            return place.absolute()
    found = "no executable bin/llama-bench in it" if path.is_dir() else "no executable file"
    raise InputError(
        f"--llama-bench: {path}: {found}, expected {WANT}; build it with "
        "`cmake -B build && cmake --build build --target llama-bench`"
    )


def dense_rate(
    program: Path, model: Path, tokens: int, threads: int, folder: str, gpu_layers: int = 0
) -> DenseRate:
    """Decode `tokens` tokens with `threads` threads.

    Args:
        program: From `find_llama_bench`.
        model: A GGUF that llama.cpp loads.
        folder: Where the program runs.
        gpu_layers: llama.cpp's -ngl: 0 keeps the model on the CPU, 1 puts the output matrix on the
            GPU, and each more another layer from the last one on.

    Raises:
        InputError: The program is not llama.cpp's llama-bench, is too old, or is a CPU build asked
            for layers on a GPU.
        EngineError: It failed or took too long.
    """
    options = ["-p", "0", "-n", str(tokens), "-r", "1", "-t", str(threads), "-ngl", str(gpu_layers)]
    command = [str(program), "-m", str(model.absolute()), *options, "-o", "json"]
    try:
        code, out, err = run_to_end(command, folder)
    except OSError as error:
        raise InputError(
            f"--llama-bench: {program}: cannot be run ({error.strerror or error}); expected {WANT}"
        ) from error
    if code:
        raise EngineError(f"{program}: llama-bench failed (exit {code}): {last_words(err)}")
    run = _only_run(program, out)
    if "backends" not in run:
        raise InputError(
            f"--llama-bench: {program}: its output does not name `backends`: it is PowerInfer's "
            "own llama-bench or one from before 2025; build a current llama.cpp and name its "
            "llama-bench"
        )
    backends = str(run["backends"])
    if gpu_layers and not set(backends.split(",")) - set(CPU_BACKENDS):
        raise InputError(
            f"--llama-bench: {program}: is a CPU build (backends: {backends}), but --vram-budget "
            "asks for layers on a GPU; build llama.cpp with -DGGML_CUDA=ON and name its "
            "llama-bench, or leave --llama-bench out"
        )
    rate = run.get("avg_ts", 0)
    if (run.get("n_gen"), run.get("n_threads")) != (tokens, threads) or not _is_rate(rate):
        raise InputError(
            f"--llama-bench: {program}: its output does not give tokens/s of {tokens} tokens by "
            f"{threads} thread(s); expected {WANT}"
        )
    return DenseRate(float(rate), f"{run.get('build_number')} ({run.get('build_commit')})")


def _only_run(program: Path, out: str) -> dict[str, Any]:
    try:
        runs = parse_json(out)
    except ValueError:
        runs = None
    if not (isinstance(runs, list) and len(runs) == 1 and isinstance(runs[0], dict)):
        raise InputError(
            f"--llama-bench: {program}: gave no JSON of one run for `-o json`, expected {WANT}"
        )
    run: dict[str, Any] = runs[0]
    return run


def _is_rate(value: Any) -> bool:
    return type(value) in (int, float) and isfinite(value) and value > 0
