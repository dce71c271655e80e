"""What `sparsecast bench train` times: our training steps, the public recipe's, and reading."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from sparsecast.cli.bench.rounds import timed
from sparsecast.cli.bench.train_store import ACTIVE
from sparsecast.collect.store.store import ActivationStore
from sparsecast.core.bitmask import unpack
from sparsecast.predictors.baselines.public_recipe import FLOOR
from sparsecast.predictors.calibration.objective import Objective
from sparsecast.predictors.training.data import LayersBatch, TokenBlocks
from sparsecast.predictors.training.lightning_module import PredictorModule
from sparsecast.predictors.training.schedule import Schedule
from sparsecast.predictors.training.warm_start import WarmStart

T = TypeVar("T")

MATMUL = {"cpu": 1024, "cuda": 8192}
"""Size of the square matrices whose product gives the peak rate."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What every run trains."""

    store: ActivationStore
    rank: int
    batch_size: int
    device: torch.device

    def batches(self) -> TokenBlocks:
        """The training batches, read from the store."""
        for_gpu = self.device.type == "cuda"
        return TokenBlocks(self.store, "train", self.batch_size, seed=0, for_gpu=for_gpu)


def ours(work: Workload, *, resident: bool) -> Callable[[int], None]:
    """A function that trains all layers for a number of steps.

    Args:
        resident: Hold all batches on the device.
    """
    recorded = work.store.manifest
    start = random_start(
        recorded.hidden_size, recorded.ffn_width, len(recorded.layers), work.rank, work.device
    )
    blocks = work.batches()
    batches = [_to(batch, work.device) for batch in blocks] if resident else blocks
    return training(start, batches, work.batch_size, work.device)


def training(
    start: WarmStart, batches: Iterable[LayersBatch], batch_size: int, device: torch.device
) -> Callable[[int], None]:
    """A function that trains the default recipe's predictors for a number of steps.

    Args:
        batches: Of `batch_size` tokens each; taken again and again.
    """
    schedule = Schedule(num_epochs=6, batch_tokens=batch_size, peak_lr=3e-3)
    module = PredictorModule(start, dtype="f16", objective=Objective(), schedule=schedule)
    module.to(device).log = lambda *_, **__: None  # type: ignore[method-assign]
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=0.01, fused=True)

    def run(steps: int) -> None:
        for batch in islice(_endless(batches), steps):
            with _precision(device):
                loss = module.training_step(_to(batch, device), 0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return run


def reading(work: Workload) -> Callable[[int], None]:
    """A function that reads the batches of a number of steps and copies them to the device."""
    blocks = work.batches()

    def run(steps: int) -> None:
        for batch in islice(_endless(blocks), steps):
            _to(batch, work.device)

    return run


def random_start(d: int, f: int, layers: int, rank: int, device: torch.device) -> WarmStart:
    """Random weights for predictors in f16."""
    fc1_LRD = torch.randn(layers, rank, d, device=device) / d**0.5
    fc2_LFR = torch.randn(layers, f, rank, device=device) / rank**0.5
    return WarmStart(
        None, None, fc1_LRD, fc2_LFR, None, torch.full((layers,), ACTIVE, device=device)
    )


def public_recipe(work: Workload) -> Callable[[int], None]:
    """A function that trains the first layer for a number of steps, as the public trainers do."""
    d, f, device = work.store.manifest.hidden_size, work.store.manifest.ffn_width, work.device
    rows = work.store.rows("train", 0, 0)
    data = Rows(rows.x_TD.half().numpy(), unpack(rows.mask_TP, f).half().numpy())
    first, second = nn.Linear(d, work.rank, bias=False), nn.Linear(work.rank, f, bias=False)
    net = nn.Sequential(first, nn.ReLU(), second).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.01)
    loader = DataLoader(data, batch_size=work.batch_size, shuffle=True)

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


class Rows(Dataset[tuple[Tensor, Tensor]]):
    """Rows of float16 matrices, converted to float tensors one by one.

    A row without an active entry is an error, as in the public trainers.
    """

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


def matmul_rate(device: torch.device) -> float:
    """Operations per second of a large square matrix product: the median of 5."""
    size = MATMUL[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = [timed(lambda: [a @ b for _ in range(10)], device) / 10 for _ in range(6)][1:]
    return 2 * size**3 / statistics.median(seconds)


def _endless(batches: Iterable[T]) -> Iterator[T]:
    """The batches of epoch after epoch."""
    while True:
        yield from batches


def _to(batch: LayersBatch, device: torch.device) -> LayersBatch:
    x_LBD, mask_LBP = (part.to(device, non_blocking=True) for part in batch[:2])
    return LayersBatch(x_LBD, mask_LBP)


def _precision(device: torch.device) -> AbstractContextManager[Any]:
    if device.type == "cuda":
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return nullcontext()
