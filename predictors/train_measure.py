"""Measure the parts of a training run on one or two layers, for a forecast of the whole.

Predictors of different layers are independent and trained side by side, so the memory and the time
of a step are linear in the layers. The moments and regressions of the warm start, and the
calibration, are done layer by layer: one batch of each is timed. The regression's two
eigendecompositions, which take D^3 operations, are timed on a smaller matrix.

Shape letters: L layers, B batch, T tokens, D hidden, F FFN width, P packed width, R rank.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from sparsecast.core.dry_run import seconds_of, timed
from sparsecast.core.memory import watch_memory
from sparsecast.predictors.baselines.public_recipe import PublicRecipeModule
from sparsecast.predictors.calibration.bias import bias_of, bias_units
from sparsecast.predictors.metrics import ScoreHistogram, count
from sparsecast.predictors.predictor import Predictor
from sparsecast.predictors.training.data import LayersBatch
from sparsecast.predictors.training.lightning_module import PredictorModule
from sparsecast.predictors.training.plan import TrainingPlan
from sparsecast.predictors.training.warm_start import Moments, MomentSums, WarmStart, reduced_rank

STEPS, ENOUGH = 8, 2.0
"""Most training steps that are timed, and the seconds after which no more are."""
ROUNDS = 4
"""Passes over the calibration split that a layer's threshold usually takes."""
SMALL = 1024
"""Hidden size of the regression that is timed."""
ROWS = 1024
"""Tokens that moments and calibration take at once, see `layer_batches`."""
ACTIVE = 0.1
"""Share of active neurons in random masks."""

Batches = Callable[[TrainingPlan], Iterator[LayersBatch]]
"""Training batches of a plan's layers, at least `STEPS` + 2 of them."""


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Training of some layers side by side."""

    host: int
    """The most main memory that the process held of its own."""
    on_device: int
    """The same on a GPU."""
    step_seconds: float
    check_seconds: float
    """Of a batch of calibration, with which every epoch ends."""


def measure_steps(plan: TrainingPlan, batches: Batches, layers: int) -> Steps:
    """Train the first of `plan.own_layers` for a few steps, from random weights."""
    cut, device = replace(plan, own_layers=plan.own_layers[:layers]), plan.device
    on_gpu = device.type == "cuda"
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    with watch_memory() as peak:
        module: Any = _module(cut).to(device)
        module.log = lambda *_, **__: None
        optimizer = torch.optim.AdamW(module.parameters(), fused=plan.recipe == "default")
        stream = batches(cut)
        step = partial(_step, module, optimizer, stream, device)
        step()
        seconds = [seconds_of(step, device)]
        while len(seconds) < STEPS and sum(seconds) < ENOUGH:
            seconds.append(seconds_of(step, device))
        batch = _to(next(stream), device)
        module.on_validation_epoch_start()
        check_seconds = timed(partial(_check, module, batch, device), device)
    return Steps(
        host=peak.own,
        on_device=torch.cuda.max_memory_allocated(device) if on_gpu else 0,
        step_seconds=sum(seconds) / len(seconds),
        check_seconds=check_seconds,
    )


def _step(module: Any, optimizer: Any, stream: Iterator[LayersBatch], device: torch.device) -> None:
    with _precision(device):
        loss = module.training_step(_to(next(stream), device), 0)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@torch.no_grad()
def _check(module: Any, batch: LayersBatch, device: torch.device) -> None:
    with _precision(device):
        module.validation_step(batch, 0)


def _module(plan: TrainingPlan) -> Any:
    """Build the recipe's module of `plan.own_layers` with random weights."""
    d, f, layers = plan.shape.hidden_size, plan.shape.ffn_width, len(plan.own_layers)
    if plan.recipe == "reference":
        return PublicRecipeModule(
            plan.schedule, layers=plan.own_layers, rank=plan.ranks[0], shape=plan.shape
        )
    units = max(plan.free_units)
    quantized = plan.dtype != "f16"
    start = WarmStart(
        torch.randn(layers, d) if quantized else None,
        torch.randn(layers, d) if quantized else None,
        torch.randn(layers, units, d) / d**0.5,
        torch.randn(layers, f, units) / units**0.5,
        torch.randn(layers, f) if quantized else None,
        torch.full((layers,), ACTIVE),
    )
    return PredictorModule(
        start, dtype=plan.dtype, objective=plan.objective, schedule=plan.schedule
    )


def random_batches(plan: TrainingPlan) -> Iterator[LayersBatch]:
    """Batches of random inputs, masks and, where the loss needs them, values; without end."""
    d, packed = plan.shape.hidden_size, -(-plan.shape.ffn_width // 8)
    layers, tokens = len(plan.own_layers), plan.schedule.batch_tokens
    x_LBD = torch.randn(layers, tokens, d).half()
    mask_LBP = torch.randint(256, (layers, tokens, packed), dtype=torch.uint8)
    value_LBF = None
    if plan.loss == "value":
        value_LBF = torch.randint(256, (layers, tokens, plan.shape.ffn_width), dtype=torch.uint8)
    while True:
        batch = LayersBatch(x_LBD.clone(), mask_LBP.clone())
        yield batch if value_LBF is None else batch._replace(value_LBF=value_LBF.clone())


def moment_seconds(plan: TrainingPlan) -> float:
    """Return the seconds that the moments of one layer take per token."""
    d, f, device = plan.shape.hidden_size, plan.shape.ffn_width, plan.device
    x_TD, active_TF = _random_rows(plan)
    sums = MomentSums(d, f, device)
    return timed(lambda: sums.add(x_TD, active_TF), device) / ROWS


def regression_seconds(plan: TrainingPlan) -> float:
    """Return the seconds of one layer's regression."""
    d = min(SMALL, plan.shape.hidden_size)
    scale = plan.shape.hidden_size / d
    f, units = math.ceil(plan.shape.ffn_width / scale), math.ceil(max(plan.free_units) / scale)
    x_TD = torch.randn(2 * d, d, device=plan.device)
    moments = Moments(
        x_TD.T @ x_TD / len(x_TD),
        x_TD.mean(0),
        torch.randn(f, d, device=plan.device) / d**0.5,
        torch.full((f,), ACTIVE, device=plan.device),
    )
    return timed(lambda: reduced_rank(moments, units), plan.device) * scale**3


def calibration_seconds(plan: TrainingPlan) -> float:
    """Return the seconds that the calibration of one layer takes per token, all passes included."""
    d, f, device = plan.shape.hidden_size, plan.shape.ffn_width, plan.device
    rank = max(plan.free_units) + (0 if plan.dtype == "f16" else bias_units(plan.dtype))
    fc1_RD, fc2_FR = torch.randn(rank, d) / d**0.5, torch.randn(f, rank) / rank**0.5
    predictor = Predictor(fc1_RD.to(device), fc2_FR.to(device), plan.dtype)
    x_TD, active_TF = _random_rows(plan)
    histogram, constant_R = ScoreHistogram(), torch.ones(rank)

    def score() -> None:
        logits_TF = predictor.logits(x_TD)
        histogram.add(logits_TF / bias_of(predictor, constant_R, x_TD), active_TF)
        count(logits_TF >= 0, active_TF)

    rounds = 1 if plan.recipe == "reference" else ROUNDS
    return rounds * timed(score, device) / ROWS


def _random_rows(plan: TrainingPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs (T, D) and masks (T, F) of `ROWS` tokens of one layer."""
    x_TD = torch.randn(ROWS, plan.shape.hidden_size, device=plan.device).half()
    return x_TD, torch.rand(ROWS, plan.shape.ffn_width, device=plan.device) < ACTIVE


def _to(batch: LayersBatch, device: torch.device) -> LayersBatch:
    value_LBF = None if batch.value_LBF is None else batch.value_LBF.to(device)
    return LayersBatch(
        batch.x_LBD.to(device), batch.mask_LBP.to(device), batch.rows, value_LBF=value_LBF
    )


def _precision(device: torch.device) -> AbstractContextManager[Any]:
    """Compute as the trainer does: bf16-mixed on a GPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
