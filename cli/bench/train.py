"""`sparsecast bench train`: token-layers per second of training, ours and the public recipe's.

    store       the default recipe's step on all layers together; the next batch is read from the
                memory maps of an activation store while the current one trains
    resident    the same with the packed batches already on the device
    read        only reading the store's batches and copying them to the device
    reference   the public recipe layer by layer: rows of float16 matrices through a DataLoader, one
                optimizer per layer, its own weighted loss

All use the same batch size, rank and precision (float32 on the CPU, bf16 autocast on a GPU); ours
train in the f16 format, as the public recipe does. Lightning's bookkeeping is left out on both
sides. One step of each runs first; then rounds take them in turn, and medians are reported. The
data is random.

mfu is 6 * tokens * layers * (D R + R F) operations divided by the time, relative to the rate of one
large matrix product of the same precision in this run.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from sparsecast.cli.bench.results import check_json, new_table, publish
from sparsecast.cli.bench.rounds import device_name, in_rounds, medians, timed
from sparsecast.cli.bench.train_runs import Workload, matmul_rate, ours, public_recipe, reading
from sparsecast.cli.bench.train_store import random_store
from sparsecast.core.errors import InputError
from sparsecast.core.messages import log, show
from sparsecast.core.models.loading import pick_device
from sparsecast.core.options import validate_fields

SHAPES = {"tiny": (256, 1024, 6), "1024": (1024, 2816, 4), "7b": (4096, 11008, 32)}
"""(hidden size, FFN width, layers)."""
PAPER_TOKENS, PAPER_EPOCHS = 400_000, 20
"""Amount of training that the public recipe was published with."""


@dataclass(frozen=True, kw_only=True)
class BenchTrainConfig:
    """Time training steps of all layers together against the public recipe layer by layer."""

    shape: Literal["tiny", "1024", "7b"] = "tiny"
    """tiny (256, 1024, 6 layers), 1024 (1024, 2816, 4 layers) or 7b (4096, 11008, 32 layers)."""

    rank: int | None = None
    """Hidden width of each predictor; unset: a quarter of the hidden size."""

    batch_size: int = 1024
    """Tokens per step."""

    steps: int = 8
    """Steps per round."""

    rounds: int = 3
    """Timed rounds."""

    device: str = "auto"
    """auto, cpu or cuda."""

    json: Path | None = None
    """Write the numbers to this file."""

    def __post_init__(self) -> None:
        validate_fields(self, rank=5, batch_size=32, steps=1, rounds=1)
        if self.batch_size % 32:
            raise InputError(f"--batch-size: must be a multiple of 32, got {self.batch_size}")


def bench_train(cfg: BenchTrainConfig) -> dict[str, Any]:
    """Rates, their ratios, and the time that the published amount of training would take.

    Memory: predictors with gradients and moments, and `cfg.steps` batches on the device; as many
    batches on the disk, in a temporary store.
    """
    check_json(cfg.json)
    d, f, layers = SHAPES[cfg.shape]
    rank = cfg.rank or d // 4
    device = pick_device(cfg.device)
    tokens = cfg.batch_size * cfg.steps
    with tempfile.TemporaryDirectory(prefix="sparsecast-bench-") as folder:
        work = Workload(
            store=random_store(Path(folder), d, f, layers, tokens),
            rank=rank,
            batch_size=cfg.batch_size,
            device=device,
        )
        runs: dict[str, Callable[[int], None]] = {
            "store": ours(work, resident=False),
            "resident": ours(work, resident=True),
            "read": reading(work),
            "reference": public_recipe(work),
        }
        for run in runs.values():
            run(1)
        measures = {
            name: partial(timed, partial(run, cfg.steps), device) for name, run in runs.items()
        }
        seconds = medians(in_rounds(measures, cfg.rounds))
    rate = {
        name: tokens * (1 if name == "reference" else layers) / s for name, s in seconds.items()
    }
    peak = matmul_rate(device)
    operations = 6 * rank * (d + f)
    values = {
        "shape": cfg.shape,
        "rank": rank,
        "batch_size": cfg.batch_size,
        "device": device_name(device),
        "token_layers_per_s": rate,
        "speedup": rate["store"] / rate["reference"],
        "mfu": rate["resident"] * operations / peak,
        "store_mfu": rate["store"] * operations / peak,
        "store_of_limit": rate["store"] / min(rate["resident"], rate["read"]),
        "matmul_tflops": peak / 1e12,
        "extrapolated_minutes": {
            name: PAPER_TOKENS * PAPER_EPOCHS * layers / value / 60
            for name, value in rate.items()
            if name != "read"
        },
    }
    return publish(values, cfg.json, _show)


def _show(values: dict[str, Any]) -> None:
    log.info(
        f"{values['shape']}, rank {values['rank']}, batch {values['batch_size']}, "
        f"{values['device']}; a large matrix product runs at {values['matmul_tflops']:.3g} TFLOP/s"
    )
    table = new_table("", "token-layers/s", "minutes, extrapolated")
    for name, rate in values["token_layers_per_s"].items():
        minutes = values["extrapolated_minutes"].get(name)
        table.add_row(name, f"{rate:,.0f}", "" if minutes is None else f"{minutes:,.0f}")
    show(table)
    _, _, layers = SHAPES[values["shape"]]
    log.info(
        f"from the store {values['speedup']:.2f} times the reference; resident batches reach "
        f"{values['mfu']:.1%} of the matrix rate, the store {values['store_mfu']:.1%}, "
        f"{values['store_of_limit']:.1%} of the slower of resident batches and reading. Minutes "
        f"are for {PAPER_TOKENS:,} tokens, {PAPER_EPOCHS} epochs and {layers} layers"
    )
