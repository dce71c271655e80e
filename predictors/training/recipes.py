"""The recipes of `sparsecast train`: from a source of batches to calibrated predictors, behind one
signature.

Adding a recipe is adding a function to `RECIPES`. Under torchrun every process runs it; the
leading one gets the predictors of all layers, the others None.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from sparsecast.predictors.baselines.label_clipping import ClippedStore
from sparsecast.predictors.baselines.public_recipe import ReferenceModule
from sparsecast.predictors.baselines.svd import svd
from sparsecast.predictors.calibration.bias import UncalibratedPredictor, bias_units
from sparsecast.predictors.calibration.calibrate import Calibrated, at_zero, constant_of
from sparsecast.predictors.calibration.operating_point import operate
from sparsecast.predictors.config import TrainConfig
from sparsecast.predictors.predictor import Predictor
from sparsecast.predictors.recorded_model import load_recorded
from sparsecast.predictors.training.layer_parallel import gathered
from sparsecast.predictors.training.lightning_module import PredictorModule
from sparsecast.predictors.training.source import Recorded, Source
from sparsecast.predictors.training.trainer import Run, checkpoint_of, fit, work_folder
from sparsecast.predictors.training.warm_start import no_start, warm_start


class Job(NamedTuple):
    """What a recipe is asked for."""

    cfg: TrainConfig
    source: Source
    dtype: str
    """The format of the predictors."""
    ranks: list[int]
    """Of every layer's predictor, bias units included."""
    run: Run
    """Where and with whom."""


Recipe = Callable[[Job], list[Calibrated] | None]


def default(job: Job) -> list[Calibrated] | None:
    """Reduced-rank regression, then training for the format it ships in; see module.py."""
    store, run = job.source.store, job.run
    taken = 0 if job.dtype == "f16" else bias_units(job.dtype)
    free = [job.ranks[layer] - taken for layer in run.layers]
    if checkpoint_of(job.cfg, run).is_file():
        start = no_start(store.manifest.hidden_size, store.manifest.ffn_width, free, job.dtype)
    else:
        start = warm_start(job.source.moments(run.layers, run.device), free, job.dtype)
    module = PredictorModule(job.cfg, job.dtype, start)
    fit(job.cfg, job.source, module, run)

    def constant(place: int, predictor: Predictor) -> Tensor:
        return constant_of(predictor.to(run.device), store, run.layers[place]).cpu()

    mine: dict[int, UncalibratedPredictor] = dict(
        zip(run.layers, module.uncut(free, constant), strict=True)
    )
    work, layers = work_folder(job.cfg.out), store.manifest.layers
    uncut = gathered(mine, layers, work, run.team, job.cfg.data_parallel)
    return None if uncut is None else operate(job.cfg, uncut, store, run.device)


def reference(job: Job) -> list[Calibrated] | None:
    """The public recipe; see reference.py."""
    store, run, source = job.source.store, job.run, job.source
    if job.cfg.clip_labels is not None:
        assert job.cfg.model is not None
        model = load_recorded(job.cfg.model, store, "cpu")
        source = Recorded(ClippedStore(store, model, job.cfg.clip_labels))
    module = ReferenceModule(job.cfg, store, job.ranks[0], run.layers)
    fit(job.cfg, source, module, run)
    mine = dict(zip(run.layers, module.predictors(), strict=True))
    work, layers = work_folder(job.cfg.out), store.manifest.layers
    done = gathered(mine, layers, work, run.team, job.cfg.data_parallel)
    if done is None:
        return None
    return [at_zero(layer, store, i, run.device) for i, layer in enumerate(done)]


def training_free(job: Job) -> list[Calibrated] | None:
    """The gate's whitened truncated SVD; see svd.py."""
    if not job.run.team.leads:
        return None
    store, device = job.source.store, job.run.device
    uncut = svd(job.cfg, store, job.dtype, job.ranks, device)
    return operate(job.cfg, uncut, store, device)


RECIPES: dict[str, Recipe] = {
    "default": default,
    "reference": reference,
    "svd": training_free,
}
