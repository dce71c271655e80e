"""`sparsecast bench kernels`: our GPU kernels and the whole FFN against dense torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import triton
from rich.table import Table

from sparsecast.cli.bench.kernels_checks import Case
from sparsecast.cli.bench.kernels_table import SHAPES, as_row, dense, steps
from sparsecast.cli.bench.timing import copy_bandwidth
from sparsecast.core.errors import InputError
from sparsecast.core.files import check_writable_file, write_json
from sparsecast.core.messages import log, show
from sparsecast.core.options import validate_fields
from sparsecast.core.progress import progress_bar
from sparsecast.kernels.ops.launch import MAX_TOKENS

Shape = Literal["30m", "1b", "7b", "13b", "70b", "opt-1.3b", "opt-6.7b"]
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class BenchKernelsConfig:
    """Time the sparse FFN's kernels, step by step and whole, against dense torch on this GPU."""

    shapes: list[Shape] = field(default_factory=lambda: ["1b", "7b", "13b"])
    """30m (hidden size 512, FFN 2048), 1b (1536, 3840), 7b (4096, 11008), 13b (5120, 13824), 70b
    (8192, 28672); without a gate opt-1.3b (2048, 8192), opt-6.7b (4096, 16384)."""

    sparsities: list[float] = field(default_factory=lambda: [0.0, 0.5, 0.7, 0.8, 0.89, 0.95, 0.98])
    """Shares of inactive neurons per token, 0 to 0.99."""

    batches: list[int] = field(default_factory=lambda: [1, 4, 16])
    """Tokens of a batch, 1 to 16."""

    rank: int | None = None
    """Hidden width of the predictor; unset: a quarter of the hidden size."""

    dtype: Literal["bf16", "f16"] = "bf16"
    """bf16 or f16."""

    json: Path | None = None
    """Write the numbers to this file."""

    def __post_init__(self) -> None:
        validate_fields(self, rank=MAX_TOKENS)
        if not all(0 <= s <= 0.99 for s in self.sparsities):
            raise InputError(
                f"--sparsities: got {self.sparsities}, expected numbers from 0 to 0.99; sparser "
                "steps read so little that no memory holds enough weights to rotate over"
            )
        if not all(1 <= b <= MAX_TOKENS for b in self.batches):
            raise InputError(f"--batches: got {self.batches}, expected numbers from 1 to 16")


def bench(cfg: BenchKernelsConfig) -> dict[str, Any]:
    """Run it. Takes up to 22 GiB of GPU memory at a sparsity of 0.99."""
    if cfg.json is not None:
        check_writable_file(cfg.json, "--json")
    device = _device()
    copy = copy_bandwidth(device)
    count = len(cfg.shapes) * len(cfg.batches) * len(cfg.sparsities)
    rows = []
    with progress_bar("bench", count) as progress:
        for cases in _cases(cfg, device):
            against = dense(cases[0])
            for case in cases:
                rows += [as_row(case, timed, copy) for timed in steps(case, against)]
                progress.advance()
    values = {
        "rows": rows,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter",
        "copy_gb_per_s": copy,
        "dtype": cfg.dtype,
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    _show(values)
    if cfg.json is not None:
        write_json(cfg.json, values)
    return values


def _device() -> torch.device:
    if not torch.cuda.is_available():
        raise InputError(
            "bench kernels: this machine has no CUDA device, and nothing else would say how fast "
            "the kernels are; run it where there is one"
        )
    return torch.device("cuda", 0)


def _cases(cfg: BenchKernelsConfig, device: torch.device) -> Iterator[list[Case]]:
    """Those that share their dense side."""
    for name in cfg.shapes:
        d, f, matrices = SHAPES[name]
        for tokens in cfg.batches:
            yield [
                Case(name, d, f, matrices, cfg.rank or d // 4, s, tokens, DTYPES[cfg.dtype], device)
                for s in cfg.sparsities
            ]


def _show(values: dict[str, Any]) -> None:
    log.info(
        f"{values['device']}, {values['dtype']}, torch {values['torch']}, triton "
        f"{values['triton']}; a copy moves {values['copy_gb_per_s']:,.0f} GB/s"
    )
    table = Table()
    names = (
        "shape", "batch", "sparsity", "step",
        "us", "dense us", "speedup", "GB/s", "of copy", "auto",
    )  # fmt: skip
    for name in names:
        table.add_column(name, justify="left" if name in ("shape", "step") else "right")
    for row in values["rows"]:
        has_dense = row["dense_us"] is not None
        table.add_row(
            row["shape"],
            str(row["batch"]),
            f"{row['sparsity']:g}",
            row["step"],
            f"{row['us']:.1f}",
            f"{row['dense_us']:.1f}" if has_dense else "",
            f"{row['speedup']:.2f}" if has_dense else "",
            f"{row['gb_per_s']:,.0f}",
            f"{row['of_copy_bandwidth']:.0%}",
            {None: "", True: "yes", False: "no"}[row["auto"]],
        )
    show(table)
