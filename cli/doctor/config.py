"""Options of doctor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparsecast.core.options import validate_fields


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Say what this machine can do: packages, GPUs, kernels, compiler, memory, disk, engines and
    optional parts, and what to install for each that is missing. Exit code 0 if all that every
    stage needs works, else 1."""

    engine: Path | None = None
    """Build folder of PowerInfer to look at (default: that which POWERINFER_BUILD names)."""

    llama_bench: Path | None = None
    """llama.cpp's llama-bench, or its build folder (default: that which LLAMA_CPP_BUILD names)."""

    json: Path | None = None
    """Also write the findings to this file."""

    def __post_init__(self) -> None:
        validate_fields(self)
