"""The recipes of `sparsecast train`: from a store to calibrated predictors, behind one signature.

Adding a recipe is adding a function to `RECIPES`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsecast.collect.store import ActivationStore
from sparsecast.predictors.bias import bias_units
from sparsecast.predictors.calibrate import Calibrated, at_zero, constant_of
from sparsecast.predictors.config import TrainConfig
from sparsecast.predictors.fit import fit
from sparsecast.predictors.mlp import Predictor
from sparsecast.predictors.module import PredictorModule
from sparsecast.predictors.objective import operate
from sparsecast.predictors.reference import ReferenceModule
from sparsecast.predictors.svd import svd
from sparsecast.predictors.warm_start import warm_start


class Job(NamedTuple):
    """What a recipe is asked for."""

    cfg: TrainConfig
    store: ActivationStore
    dtype: str
    """The format of the predictors."""
    ranks: list[int]
    """Of every layer, bias units included."""
    device: torch.device
    shared: dict[str, Any]
    """What a resumed run must share."""


Recipe = Callable[[Job], list[Calibrated]]


def default(job: Job) -> list[Calibrated]:
    """Reduced-rank regression, then training for the format it ships in; see module.py."""
    taken = 0 if job.dtype == "f16" else bias_units(job.dtype)
    free = [rank - taken for rank in job.ranks]
    start = warm_start(job.store, free, job.dtype, job.device)
    module = PredictorModule(job.cfg, job.dtype, start)
    fit(job.cfg, job.store, module, job.device, job.shared)

    def constant(layer: int, predictor: Predictor) -> Tensor:
        return constant_of(predictor.to(job.device), job.store, layer).cpu()

    return operate(job.cfg, module.uncut(free, constant), job.store, job.device)


def reference(job: Job) -> list[Calibrated]:
    """The public recipe; see reference.py."""
    module = ReferenceModule(job.cfg, job.store, job.ranks[0])
    fit(job.cfg, job.store, module, job.device, job.shared)
    return [at_zero(layer, job.store, i, job.device) for i, layer in enumerate(module.predictors())]


def training_free(job: Job) -> list[Calibrated]:
    """The gate's whitened truncated SVD; see svd.py."""
    uncut = svd(job.cfg, job.store, job.dtype, job.ranks, job.device)
    return operate(job.cfg, uncut, job.store, job.device)


RECIPES: dict[str, Recipe] = {
    "default": default,
    "reference": reference,
    "svd": training_free,
}
