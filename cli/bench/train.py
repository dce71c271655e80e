"""`sparsecast bench train`: token-layers per second of training, ours and the public recipe's.

    store       the default recipe's step on all layers together, batches read from the memory maps
                of an activation store while the last one trains
    resident    the same with the packed batches already on the device
    read        the store's batches alone, read and copied to the device
    reference   the public recipe layer by layer: rows of float16 matrices through a DataLoader, one
                optimiser a layer, its own weighted loss

All at one batch size, rank and precision (float32 on the CPU, bf16 autocast on a GPU); ours in the
f16 format, as the reference is. Lightning's own bookkeeping is left out on both sides. A round runs
them in turn, and medians are reported; one step of each is run before. The data is random.

mfu is 6 * tokens * layers * (D R + R F) operations over the time, relative to the rate of one large
matrix product of the same precision in this run.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from sparsecast.collect.store.filler import Filler
from sparsecast.collect.store.store import ActivationStore, Manifest, seal
from sparsecast.collect.store.units import Unit
from sparsecast.collect.store.writer import Writer, record_unit, to_folder
from sparsecast.core.bitmask import unpack
from sparsecast.core.errors import InputError
from sparsecast.core.files import check_writable_file, write_json
from sparsecast.core.messages import log, show
from sparsecast.core.models.loading import pick_device
from sparsecast.core.options import validate_fields
from sparsecast.core.progress import progress_bar
from sparsecast.core.text.splits import SPLITS
from sparsecast.core.text.tokens import TokenBatch
from sparsecast.predictors.baselines.public_recipe import FLOOR
from sparsecast.predictors.calibration.objective import Objective
from sparsecast.predictors.training.data import LayersBatch, TokenBlocks
from sparsecast.predictors.training.lightning_module import PredictorModule
from sparsecast.predictors.training.schedule import Schedule
from sparsecast.predictors.training.warm_start import WarmStart

T = TypeVar("T")

SHAPES = {"tiny": (256, 1024, 6), "1024": (1024, 2816, 4), "7b": (4096, 11008, 32)}
"""(hidden size, FFN width, layers)."""
ACTIVE = 0.12
"""Share of active entries."""
MATMUL = {"cpu": 1024, "cuda": 8192}
PAPER_TOKENS, PAPER_EPOCHS = 400_000, 20


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


def bench(cfg: BenchTrainConfig) -> dict[str, Any]:
    """Run it; rates, ratios and what they mean for the published amount of training.

    Memory: predictors with gradients and moments, `cfg.steps` batches on the device, and on the
    disk as many in a temporary store.
    """
    if cfg.json is not None:
        check_writable_file(cfg.json, "--json")
    d, f, layers = SHAPES[cfg.shape]
    rank = cfg.rank or d // 4
    device = pick_device(cfg.device)
    with tempfile.TemporaryDirectory(prefix="sparsecast-bench-") as folder:
        store = random_store(Path(folder), d, f, layers, cfg.batch_size * cfg.steps)
        runs: dict[str, Callable[[int], None]] = {
            "store": _ours(cfg, store, rank, device, resident=False),
            "resident": _ours(cfg, store, rank, device, resident=True),
            "read": partial(_read, _blocks(cfg, store, device), device),
            "reference": _reference(cfg, store, rank, device),
        }
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        with progress_bar("bench", cfg.rounds * len(runs)) as progress:
            for run in runs.values():
                run(1)
            for _ in range(cfg.rounds):
                for name, run in runs.items():
                    seconds[name].append(_timed(partial(run, cfg.steps), device))
                    progress.advance()
    tokens = cfg.batch_size * cfg.steps
    worked = {name: 1 if name == "reference" else layers for name in runs}
    rate = {name: tokens * worked[name] / statistics.median(s) for name, s in seconds.items()}
    peak = _matmul_rate(device)
    per_token_layer = 6 * rank * (d + f)
    values = {
        "shape": cfg.shape,
        "rank": rank,
        "batch_size": cfg.batch_size,
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads",
        "token_layers_per_s": rate,
        "speedup": rate["store"] / rate["reference"],
        "mfu": rate["resident"] * per_token_layer / peak,
        "store_mfu": rate["store"] * per_token_layer / peak,
        "store_of_limit": rate["store"] / min(rate["resident"], rate["read"]),
        "matmul_tflops": peak / 1e12,
        "extrapolated_minutes": {
            name: PAPER_TOKENS * PAPER_EPOCHS * layers / value / 60
            for name, value in rate.items()
            if name != "read"
        },
    }
    _show(values, layers)
    if cfg.json is not None:
        write_json(cfg.json, values)
    return values


def random_store(folder: Path, d: int, f: int, layers: int, tokens: int) -> ActivationStore:
    """A store of random inputs and masks, written as `collect` writes; held-out and calibration
    hold a token each. Memory: one layer of a shard."""
    made = Manifest(
        model="random", fingerprint="0" * 16, model_type="llama", config={}, threads=1,
        dtype="bfloat16", tokenizer="none", convention="none", activation="relu",
        activation_threshold=0.0, corpus="random", options={}, layers=list(range(layers)),
        hidden_size=d, ffn_width=f, ffn_matrices=3, x_dtype="bfloat16", energy=False,
    )  # fmt: skip
    filler = Filler(made.shape)
    counts = {"train": tokens, "calibration": 1, "held-out": 1}
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(tokens, d, generator=generator).bfloat16()
    x1_TF = (torch.rand(tokens, f, generator=generator) < ACTIVE).bfloat16()

    def forward(batch: TokenBatch) -> None:
        for layer in range(layers):
            filler(layer, x_TD[: batch.tokens], x1_TF[: batch.tokens])

    shards = []
    with Writer(made.shape, made.shape.nbytes(tokens), to_folder(folder)) as writer:
        for split in SPLITS:
            ids = torch.zeros(1, counts[split], dtype=torch.int64)
            unit = Unit(split, 0, [TokenBatch(split, ids, torch.ones_like(ids).bool())])
            record_unit(filler, writer, unit, forward)
            shards.append(unit.info)
    seal(folder, made, shards)
    return ActivationStore(folder)


def _ours(
    cfg: BenchTrainConfig,
    store: ActivationStore,
    rank: int,
    device: torch.device,
    *,
    resident: bool,
) -> Callable[[int], None]:
    d, f, layers = SHAPES[cfg.shape]
    schedule = Schedule(num_epochs=6, batch_tokens=cfg.batch_size, peak_lr=3e-3)
    start = _random_start(d, f, layers, rank)
    module = PredictorModule(start, dtype="f16", objective=Objective(), schedule=schedule)
    module.to(device)
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
    blocks = _blocks(cfg, store, device)
    kept = [_to(batch, device) for batch in blocks] if resident else []

    def run(steps: int) -> None:
        batches: Iterable[LayersBatch] = kept if resident else blocks
        for batch in islice(_endless(batches), steps):
            with _precision(device):
                loss = module.training_step(_to(batch, device), 0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return run


def _blocks(cfg: BenchTrainConfig, store: ActivationStore, device: torch.device) -> TokenBlocks:
    return TokenBlocks(store, "train", cfg.batch_size, seed=0, for_gpu=device.type == "cuda")


def _read(blocks: TokenBlocks, device: torch.device, steps: int) -> None:
    for batch in islice(_endless(blocks), steps):
        _to(batch, device)


def _random_start(d: int, f: int, layers: int, rank: int) -> WarmStart:
    fc1_LRD = torch.randn(layers, rank, d) / d**0.5
    fc2_LFR = torch.randn(layers, f, rank) / rank**0.5
    return WarmStart(None, fc1_LRD, fc2_LFR, None, torch.full((layers,), ACTIVE))


def _reference(
    cfg: BenchTrainConfig, store: ActivationStore, rank: int, device: torch.device
) -> Callable[[int], None]:
    """One layer, as the public trainers have it."""
    d, f, _ = SHAPES[cfg.shape]
    rows = store.rows("train", 0, 0)
    data = _Rows(rows.x_TD.half().numpy(), unpack(rows.mask_TP, f).half().numpy())
    net = nn.Sequential(nn.Linear(d, rank, bias=False), nn.ReLU(), nn.Linear(rank, f, bias=False))
    net.to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.01)

    loader = DataLoader(data, batch_size=cfg.batch_size, shuffle=True)

    def run(steps: int) -> None:
        for x_TD, label_TF in islice(_endless(loader), steps):
            with _precision(device):
                logits_TF = net(x_TD.to(device).float())
                y_TF = (label_TF.to(device) > 0).to(logits_TF.dtype)
                weight = y_TF.mean() + FLOOR
                loss = nn.functional.binary_cross_entropy_with_logits(
                    logits_TF, y_TF, weight=y_TF * (1 - weight) + weight
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return run


def _endless(batches: Iterable[T]) -> Iterator[T]:
    """Read anew, epoch after epoch."""
    while True:
        yield from batches


class _Rows(Dataset[tuple[Tensor, Tensor]]):
    """Rows of float16 matrices, made float tensors one by one; one with nothing active is an error,
    as in the public trainers."""

    def __init__(self, x_TD: np.ndarray, label_TF: np.ndarray) -> None:
        self._x_TD = x_TD
        self._label_TF = label_TF

    def __len__(self) -> int:
        return len(self._x_TD)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        x_D, label_F = torch.Tensor(self._x_TD[row]), torch.Tensor(self._label_TF[row])
        if not label_F.sum():
            raise ValueError(f"row {row} has no active neuron")
        return x_D, label_F


def _to(batch: LayersBatch, device: torch.device) -> LayersBatch:
    return LayersBatch(*(part.to(device, non_blocking=True) for part in batch))


def _precision(device: torch.device) -> AbstractContextManager[Any]:
    if device.type == "cuda":
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return nullcontext()


def _timed(run: Callable[[], object], device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    run()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _matmul_rate(device: torch.device) -> float:
    """Operations per second of a square product, the median of 5."""
    size = MATMUL[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = [_timed(lambda: [a @ b for _ in range(10)], device) / 10 for _ in range(6)][1:]
    return 2 * size**3 / statistics.median(seconds)


def _show(values: dict[str, Any], layers: int) -> None:
    log.info(
        f"{values['shape']}, rank {values['rank']}, batch {values['batch_size']}, "
        f"{values['device']}; a large matrix product runs at {values['matmul_tflops']:.3g} TFLOP/s"
    )
    table = Table()
    for name in ("", "token-layers/s", "minutes, extrapolated"):
        table.add_column(name, justify="right" if name else "left")
    for name, rate in values["token_layers_per_s"].items():
        minutes = values["extrapolated_minutes"].get(name)
        table.add_row(name, f"{rate:,.0f}", "" if minutes is None else f"{minutes:,.0f}")
    show(table)
    log.info(
        f"from the store {values['speedup']:.2f} times the reference; resident batches reach "
        f"{values['mfu']:.1%} of the matrix rate, the store {values['store_mfu']:.1%}, "
        f"{values['store_of_limit']:.1%} of the slower of resident batches and reading. Minutes "
        f"are for {PAPER_TOKENS:,} tokens, {PAPER_EPOCHS} epochs and {layers} layers"
    )
