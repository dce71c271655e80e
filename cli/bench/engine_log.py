"""Read what a run of PowerInfer's `main` says: its speed, its GPU memory, or why it failed.

It writes all of it to standard error, whatever --log-disable says, which ends only its own log file
(examples/main/main.cpp at d3ebd7c). The lines of memory are in export/engine/gpu.py.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from sparsecast.export.engine.gpu import MB, REFUSED, read_told
from sparsecast.export.engine.process import EngineError, last_words

TIMING = re.compile(r"eval time =\s+\S+ ms /\s+\d+ runs.*?([\d.]+) tokens per second")


class Run(NamedTuple):
    """One run of `main`, or of llama.cpp's llama-bench, which says nothing of memory."""

    tokens_per_s: float
    used: int | None
    """Bytes of GPU memory for weights and the KV cache; None if the engine says nothing of it."""
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
        raise EngineError(f"main gave no timing (exit {code}): {last_words(err)}")
    if REFUSED in err:
        raise EngineError(
            "main did not take the gpuidx file beside the model, so it ran with another split than "
            "the one that was asked for"
        )
    told = read_told(err)
    used = None if told.fixed is None else round(told.used * MB)
    scratch = None if told.scratch is None else round(told.scratch * MB)
    return Run(float(found[-1]), used, scratch)
