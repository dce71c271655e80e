"""The recipes of `sparsecast train`: train, gather the layers of all processes, calibrate.

To add a recipe, add a function to `RECIPES`. Under torchrun every process runs it; the leading one
returns the predictors of all layers, the others None.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, TypeVar

import lightning as L
import torch

from sparsecast.collect.store.store import ActivationStore
from sparsecast.core.ggml_blocks import BLOCK
from sparsecast.core.messages import log
from sparsecast.core.torch_files import load_state, save_torch
from sparsecast.predictors.baselines.label_clipping import ClippedStore
from sparsecast.predictors.baselines.public_recipe import PublicRecipeModule
from sparsecast.predictors.baselines.svd import svd_predictors
from sparsecast.predictors.calibration.bias import (
    BiasUnits,
    SpreadBias,
    UncalibratedPredictor,
    unit_rows,
)
from sparsecast.predictors.calibration.calibrate import (
    Calibrated,
    constant_combination,
    without_calibration,
)
from sparsecast.predictors.calibration.operating_point import calibrate_layers
from sparsecast.predictors.predictor import Predictor
from sparsecast.predictors.recorded_model import load_recorded
from sparsecast.predictors.training.layer_parallel import from_state, gather_layers, state_of
from sparsecast.predictors.training.lightning_module import PredictorModule, TrainedWeights
from sparsecast.predictors.training.plan import TrainingPlan
from sparsecast.predictors.training.regroup import left_behind
from sparsecast.predictors.training.source import RecordedSource, Source
from sparsecast.predictors.training.trainer import begin, fit
from sparsecast.predictors.training.warm_start import WarmStart, no_start, warm_start

M = TypeVar("M", bound=L.LightningModule)
Recipe = Callable[[TrainingPlan, Source], list[Calibrated] | None]


def default(plan: TrainingPlan, source: Source) -> list[Calibrated] | None:
    """Start from reduced-rank regression, train for the stored format, calibrate."""
    begin(plan)
    own = _trained_experts(plan, source) if plan.shape.experts else _trained(plan, source)
    predictors = gather_layers(plan, own | select_all(plan))
    return None if predictors is None else _calibrate(plan, source.store, predictors)


def _trained(plan: TrainingPlan, source: Source) -> dict[int, UncalibratedPredictor | Predictor]:
    """Train `plan.own_layers` side by side."""

    def module_of(part: TrainingPlan) -> PredictorModule:
        return PredictorModule(
            initial_weights(part, source, part.own_units),
            dtype=part.dtype,
            objective=part.objective,
            schedule=part.schedule,
        )

    best = _fitted(plan, source, module_of).best_weights(plan.own_units)
    return {
        layer: uncalibrated(weights, plan.dtype, source.store, layer, plan.device)
        for layer, weights in zip(plan.own_layers, best, strict=True)
    }


def _fitted(plan: TrainingPlan, source: Source, module_of: Callable[[TrainingPlan], M]) -> M:
    """Train the module of `plan.own_layers`; those that an interrupted run has left behind the
    others first, up to where the others stand."""
    while (behind := left_behind(plan)) is not None:
        part, epochs = behind
        fit(part, source, module_of(part), epochs)
        gc.collect()  # trainer and module refer to each other, and hold the memory of the next
    module = module_of(plan)
    fit(plan, source, module)
    return module


def _trained_experts(
    plan: TrainingPlan, source: Source
) -> dict[int, UncalibratedPredictor | Predictor]:
    """Train the experts of one layer after the other; an interrupted run keeps finished layers."""
    own: dict[int, UncalibratedPredictor | Predictor] = {}
    if finished := sum(part.trained.is_file() for part in plan.groups()):
        log.info(f"resuming: the experts of {finished} layers are trained")
    for part in plan.groups():
        if not part.trained.is_file():
            done = _trained(part, source)
            save_torch({ffn: state_of(one) for ffn, one in done.items()}, part.trained)
            part.checkpoint.unlink(missing_ok=True)
            gc.collect()  # see `_fitted`
        states: dict[Any, Any] = load_state(part.trained)
        own |= {ffn: from_state(state) for ffn, state in states.items()}
    return own


def select_all(plan: TrainingPlan) -> dict[int, UncalibratedPredictor | Predictor]:
    """Predictors of the experts with too few rows: all logits are 0, so every neuron is active."""
    hidden_size, width = plan.shape.hidden_size, plan.shape.ffn_width
    nothing = Predictor(torch.zeros(BLOCK, hidden_size), torch.zeros(width, BLOCK), plan.dtype)
    return {ffn: nothing.stored() for ffn in plan.untrained}


def public_recipe(plan: TrainingPlan, source: Source) -> list[Calibrated] | None:
    """Train as the public recipe does, on clipped labels if asked for, and keep threshold 0."""
    store = source.store
    if plan.clip_labels is not None:
        assert plan.model is not None
        model = load_recorded(plan.model, store, "cpu")
        source = RecordedSource(ClippedStore(store, model, plan.clip_labels))

    def module_of(part: TrainingPlan) -> PublicRecipeModule:
        return PublicRecipeModule(
            part.schedule, layers=part.own_layers, rank=part.ranks[0], shape=part.shape
        )

    begin(plan)
    module = _fitted(plan, source, module_of)
    own = dict(zip(plan.own_layers, module.best_predictors(), strict=True))
    predictors = gather_layers(plan, own)
    if predictors is None:
        return None
    return [
        without_calibration(predictor, store, layer, plan.device)
        for layer, predictor in enumerate(predictors)
    ]


def svd(plan: TrainingPlan, source: Source) -> list[Calibrated] | None:
    """Compress the gate by a whitened truncated SVD, without training, and calibrate."""
    if not plan.context.leads:
        return None
    assert plan.model is not None
    ranks = {layer: plan.ranks[layer] for layer in plan.own_layers}
    own = svd_predictors(plan.model, source.store, plan.dtype, ranks, plan.device)
    every = own | select_all(plan)
    return _calibrate(plan, source.store, [every[layer] for layer in sorted(every)])


RECIPES: dict[str, Recipe] = {
    "default": default,
    "reference": public_recipe,
    "svd": svd,
}


def initial_weights(plan: TrainingPlan, source: Source, free_units: list[int]) -> WarmStart:
    """The warm start, or zeros if a checkpoint will replace them."""
    if plan.checkpoint.is_file():
        return no_start(plan.shape, free_units, plan.dtype)
    return warm_start(source.moments(plan.own_layers, plan.device), free_units, plan.dtype)


def uncalibrated(
    weights: TrainedWeights,
    dtype: str,
    store: ActivationStore,
    layer: int,
    device: torch.device,
) -> UncalibratedPredictor:
    """Attach a bias to one layer's trained weights: bias units, or in f16 a combination of hidden
    units that is fitted on the calibration split."""
    fc1_RD, fc2_FR, offset_F, bias_D, mean_D = weights
    if offset_F is not None and bias_D is not None and mean_D is not None:
        return BiasUnits(fc1_RD, fc2_FR, offset_F, bias_D, mean_D, dtype)
    fc1_RD, fc2_FR = unit_rows(fc1_RD, fc2_FR)
    predictor = Predictor(fc1_RD, fc2_FR).stored().to(device)
    return SpreadBias(fc1_RD, fc2_FR, constant_combination(predictor, store, layer).cpu())


def _calibrate(
    plan: TrainingPlan,
    store: ActivationStore,
    predictors: list[UncalibratedPredictor | Predictor],
) -> list[Calibrated]:
    return calibrate_layers(plan.objective, predictors, store, plan.device, plan.model)
