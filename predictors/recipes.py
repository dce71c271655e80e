"""The recipes of `sparsecast train`: from a store to calibrated predictors, behind one signature.

Adding a recipe is adding a function to `RECIPES`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sparsecast.collect.store import ActivationStore
from sparsecast.predictors.bias import bias_units
from sparsecast.predictors.calibrate import Calibrated, at_zero
from sparsecast.predictors.config import TrainConfig
from sparsecast.predictors.fit import fit
from sparsecast.predictors.module import PredictorModule
from sparsecast.predictors.objective import operate
from sparsecast.predictors.reference import ReferenceModule
from sparsecast.predictors.svd import svd
from sparsecast.predictors.warm_start import warm_start

Recipe = Callable[
    [TrainConfig, ActivationStore, str, list[int], torch.device, dict[str, Any]], list[Calibrated]
]
"""(options, store, format, rank of every layer, device, what a resumed run must share)."""


def default(
    cfg: TrainConfig,
    store: ActivationStore,
    dtype: str,
    ranks: list[int],
    device: torch.device,
    recipe: dict[str, Any],
) -> list[Calibrated]:
    """Reduced-rank regression, then training for the format it ships in; see module.py."""
    free = [rank - bias_units(dtype) for rank in ranks]
    module = PredictorModule(cfg, dtype, warm_start(store, free, dtype, device))
    fit(cfg, store, module, device, recipe)
    return operate(cfg, module.uncut(free), store, device)


def reference(
    cfg: TrainConfig,
    store: ActivationStore,
    dtype: str,
    ranks: list[int],
    device: torch.device,
    recipe: dict[str, Any],
) -> list[Calibrated]:
    """The public recipe; see reference.py."""
    module = ReferenceModule(cfg, store, ranks[0])
    fit(cfg, store, module, device, recipe)
    return [at_zero(layer, store, i, device) for i, layer in enumerate(module.predictors())]


def training_free(
    cfg: TrainConfig,
    store: ActivationStore,
    dtype: str,
    ranks: list[int],
    device: torch.device,
    recipe: dict[str, Any],
) -> list[Calibrated]:
    """The gate's whitened truncated SVD; see svd.py."""
    return operate(cfg, svd(cfg, store, dtype, ranks, device), store, device)


RECIPES: dict[str, Recipe] = {
    "default": default,
    "reference": reference,
    "svd": training_free,
}
