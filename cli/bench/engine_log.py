"""Read what PowerInfer's `main` says of its speed and its GPU memory.

It writes both to standard error, whatever --log-disable says, which ends only its own log file
(llama.cpp and examples/main/main.cpp at d3ebd7c). MB and MiB are both 2^20 bytes there. A GPU build
says

    ... VRAM used: W MB                       weights before the FFN, or of a dense model's layers
    ... VRAM kv self = K MB                   the KV cache, if part of it is there
    ... offloaded F MiB of FFN weights to GPU
    ... VRAM scratch buffer: S MB             beside the budget

Its last line, "total VRAM used", counts a layer whose FFN is there as a whole twice, so the sum
W + K + F is taken.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from sparsecast.export.engine.process import EngineError, last_words

TIMING = re.compile(r"eval time =\s+\S+ ms /\s+\d+ runs.*?([\d.]+) tokens per second")
WEIGHTS = re.compile(r"(?<!total )VRAM used: ([\d.]+) MB")
CACHE = re.compile(r"VRAM kv self = ([\d.]+) MB")
FFN = re.compile(r"offloaded ([\d.]+) MiB of FFN weights to GPU")
SCRATCH = re.compile(r"VRAM scratch buffer: ([\d.]+) MB")
ASSERT = "GGML_ASSERT"
REFUSED = "failed to apply previously generated gpu split"


class Run(NamedTuple):
    """One run of `main`, or of llama.cpp's llama-bench, which says nothing of memory."""

    tokens_per_s: float
    used: int | None
    """Bytes of GPU memory for weights and the KV cache; None if the engine says nothing of it."""
    ffn: int | None
    """Bytes of those for the FFN of a PowerInfer file."""
    scratch: int | None
    """Bytes of GPU memory for intermediate results, which no budget covers."""
    build: str | None = None
    """The build of llama.cpp."""


def read_run(code: int, err: str) -> Run:
    """Read a run's exit code and standard error.

    Raises:
        EngineError: It failed, says no speed, or did not take the split beside the model.
    """
    found = TIMING.findall(err)
    if code or not found:
        raise EngineError(f"main gave no timing (exit {code}): {_reason(err)}")
    if REFUSED in err:
        raise EngineError(
            "main did not take the gpuidx file beside the model, so it ran with another split than "
            "the one that was asked for"
        )
    weights, ffn = _bytes(WEIGHTS, err), _bytes(FFN, err)
    used = None if weights is None else weights + (_bytes(CACHE, err) or 0) + (ffn or 0)
    return Run(float(found[-1]), used, ffn, _bytes(SCRATCH, err))


def _reason(err: str) -> str:
    """The last line that names an error, such as CUDA's before "current device"; or the last."""
    named = [line for line in err.splitlines() if "error" in line.lower() or ASSERT in line]
    return last_words(named[-1] if named else err)


def _bytes(pattern: re.Pattern[str], text: str) -> int | None:
    found = pattern.findall(text)
    return round(float(found[-1]) * 2**20) if found else None
