"""`sparsecast bench kernels`: our GPU kernels and the whole sparse FFN against dense torch.

Steps are listed in kernels_steps.py; times are taken as kernels_timing.py describes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from sparsecast.cli.bench.kernels_checks import Case
from sparsecast.cli.bench.kernels_steps import SHAPES, as_row, dense, steps
from sparsecast.cli.bench.kernels_timing import copy_bandwidth
from sparsecast.cli.bench.results import check_json, new_table, publish
from sparsecast.core.errors import InputError
from sparsecast.core.messages import log, show
from sparsecast.core.options import validate_fields
from sparsecast.core.progress import progress_bar
from sparsecast.kernels.ops.compiler import HAS_TRITON, triton
from sparsecast.kernels.ops.launch import MAX_TOKENS

Shape = Literal[
    "30m", "1b", "7b", "13b", "70b", "bitnet-2b", "opt-1.3b", "opt-6.7b", "minitron-4b", "afm-4.5b"
]
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class BenchKernelsConfig:
    """Time the sparse FFN's kernels, step by step and whole, against dense torch on this GPU."""

    shapes: list[Shape] = field(default_factory=lambda: ["1b", "7b", "13b"])
    """30m (hidden size 512, FFN 2048), 1b (1536, 3840), 7b (4096, 11008), 13b (5120, 13824), 70b
    (8192, 28672), bitnet-2b (2560, 6912); without a gate opt-1.3b (2048, 8192), opt-6.7b (4096,
    16384), minitron-4b (3072, 9216), afm-4.5b (2560, 18432)."""

    act: Literal["relu", "relu2"] = "relu"
    """relu or relu2, the activation of every shape. Minitron, AFM and BitNet have relu2."""

    x1_norm: bool = False
    """Put an RMS norm in front of the down projection, as BitNet has it."""

    sparsities: list[float] = field(default_factory=lambda: [0.0, 0.5, 0.7, 0.8, 0.89, 0.95, 0.98])
    """Shares of inactive neurons per token, 0 to 0.99."""

    batches: list[int] = field(default_factory=lambda: [1, 4, 16])
    """Tokens per batch, 1 to 16."""

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
                "steps read so little that the copies of weights to rotate over fit no memory"
            )
        if not all(1 <= b <= MAX_TOKENS for b in self.batches):
            raise InputError(f"--batches: got {self.batches}, expected numbers from 1 to 16")


def bench_kernels(cfg: BenchKernelsConfig) -> dict[str, Any]:
    """Microseconds, speed-ups and bandwidth of every step.

    Memory: up to 22 GiB on the GPU, at a sparsity of 0.99.

    Raises:
        InputError: No CUDA device, or no Triton.
        RuntimeError: A kernel disagrees with its reference.
    """
    check_json(cfg.json)
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
        "act": cfg.act,
        "x1_norm": cfg.x1_norm,
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    return publish(values, cfg.json, _show)


def _device() -> torch.device:
    if not torch.cuda.is_available():
        raise InputError(
            "bench kernels: this machine has no CUDA device, which the timings need; run it where "
            "there is one"
        )
    if not HAS_TRITON:
        raise InputError(
            "bench kernels: the kernels need Triton, which cannot be imported; `sparsecast doctor` "
            "says why"
        )
    return torch.device("cuda", 0)


def _cases(cfg: BenchKernelsConfig, device: torch.device) -> Iterator[list[Case]]:
    """Cases in groups that share their dense times."""
    for name in cfg.shapes:
        d, f, matrices = SHAPES[name]
        for tokens in cfg.batches:
            yield [
                Case(
                    name,
                    d,
                    f,
                    matrices,
                    cfg.rank or d // 4,
                    s,
                    tokens,
                    DTYPES[cfg.dtype],
                    device,
                    cfg.act,
                    cfg.x1_norm,
                )  # fmt: skip
                for s in cfg.sparsities
            ]


def _show(values: dict[str, Any]) -> None:
    act = values["act"] + (" and a norm of x1" if values["x1_norm"] else "")
    log.info(
        f"{values['device']}, {values['dtype']}, {act}, torch {values['torch']}, triton "
        f"{values['triton']}; a copy moves {values['copy_gb_per_s']:,.0f} GB/s"
    )
    table = new_table(
        "shape", "batch", "sparsity", "step",
        "us", "dense us", "speedup", "GB/s", "of copy", "auto",
        left=("shape", "step"),
    )  # fmt: skip
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
