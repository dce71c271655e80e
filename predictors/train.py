"""`sparsecast train`: from recorded activations, or a running model, to calibrated predictors.

The steps, top to bottom: resolve the options (planning.py), train and calibrate (recipes.py), save.
checkpoint.py describes the predictor folder that comes out.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import lightning as L

from sparsecast.collect.output import lock_output
from sparsecast.collect.store.store import ActivationStore
from sparsecast.core.disk import explain_full_disk
from sparsecast.core.distributed import DistributedContext, distributed_context
from sparsecast.core.dry_run import refuse_dry_run
from sparsecast.core.earlier_runs import check_unchanged, compare_options
from sparsecast.core.interrupts import interrupt_like
from sparsecast.core.lock import clear_lock
from sparsecast.core.messages import log
from sparsecast.core.models.ffns import ffn_name
from sparsecast.predictors.calibration.calibrate import Calibrated
from sparsecast.predictors.checkpoint import PredictorSet, load_predictors, sizes_on_disk
from sparsecast.predictors.config import TrainConfig
from sparsecast.predictors.manifest import PredictorManifest
from sparsecast.predictors.metrics import Counts, sums_of_layers
from sparsecast.predictors.planning import (
    TrainingRequest,
    check_before_recording,
    make_plan,
    open_source,
    resolve,
)
from sparsecast.predictors.recipes import RECIPES
from sparsecast.predictors.training.needs import check_needs, disk_bytes
from sparsecast.predictors.training.plan import TrainingPlan, work_folder
from sparsecast.predictors.training.trainer import LAST, clear_unfinished, finish_logs

MISSED = 0.01
"""A calibrated score this far from its target is reported."""


def train(cfg: TrainConfig) -> PredictorSet:
    """Train, calibrate and save the predictors of every layer.

    Training reads the train split, calibration the calibration split; held-out is not touched. A
    killed run resumes from its last finished epoch. A run whose objective could not be met accepts
    another objective without training again. Under torchrun the processes share the layers, or with
    `cfg.data_parallel` the batches, and all of them return the same predictors.

    Memory: the predictors of a process's layers with gradients, two AdamW moments and the best
    epoch (20 bytes a weight), four batches of these layers, and one (D, D) and one (F, D) matrix.
    Rounding to a quantized format takes another 8 bytes a weight. The store is read through memory
    maps; on a GPU a split stays there if its rows are at most 16 GiB and an eighth of the free
    memory. At the end the leading process holds the trained predictors of all layers. For a running
    model see predictors/training/online.py.

    Raises:
        InputError: No finished store, or one that lacks a layer; a finished or unfinished run for
            `cfg.out` with other options; a rank that the format cannot store; an objective that
            cannot be met.
    """
    refuse_dry_run(cfg.dry_run, "predictors.train_dry_run.forecast")
    with distributed_context() as context, ExitStack() as lock:
        with context.together():
            request = resolve(cfg, context)
            if request.finished:
                if context.leads:
                    clear_lock(request.out)
                predictors = finished_predictors(request)
                finish_logs(work_folder(request.out), request.out)  # a kill may have left them
                return predictors
            if context.leads:
                lock.enter_context(lock_output(request.out, "training"))
            if request.store is None:
                check_before_recording(request)
                _clear_unfinished(request.out, context)
        try:
            source = open_source(request)
            with context.together():
                plan = make_plan(request, source)
                check_needs(plan)
            # Ranks under a budget may be others where sums are rounded otherwise.
            plan = replace(plan, ranks=context.share(plan.ranks))
            L.seed_everything(plan.schedule.seed, verbose=False)
            need = disk_bytes(plan)
            with explain_full_disk(plan.out, need, "training", lambda: _what_is_left(plan)):
                calibrated = RECIPES[plan.recipe](plan, source)
                with context.together():
                    if calibrated is not None:
                        _save(plan, source.store, calibrated)
                        source.tell_skipped()
        except BaseException as error:
            _clear_unfinished(request.out, context)
            kept = any(work_folder(request.out).glob(LAST))
            if kept and isinstance(error, KeyboardInterrupt) and not str(error):
                told = "repeat the command to resume from the last finished epoch"
                raise interrupt_like(error, f"{request.out}: interrupted; {told}") from error
            raise
        return load_predictors(plan.out)


def _clear_unfinished(out: Path, context: DistributedContext) -> None:
    if context.leads:
        clear_unfinished(out)


def _what_is_left(plan: TrainingPlan) -> str:
    """Clear what cannot be resumed, and say what is left of a run that failed."""
    _clear_unfinished(plan.out, plan.context)
    if any(plan.work.glob(LAST)):
        return "the last finished epoch is kept: make room, and the same command goes on from there"
    return "no epoch was finished yet, nothing is left behind: make room and run it again"


def _save(plan: TrainingPlan, store: ActivationStore, calibrated: list[Calibrated]) -> None:
    """Write the predictor folder in one step, with its logs; report the calibration scores."""
    layers = [layer.predictor for layer in calibrated]
    predictors = PredictorSet(layers, 0.0, _manifest(plan, store, calibrated))
    predictors.save(plan.out, plan.run)
    finish_logs(plan.work, plan.out)
    counts = [layer.counts for layer in calibrated]
    of_layers = sums_of_layers(counts, predictors.experts)
    recall = sum(c.recall for c in of_layers) / len(of_layers)
    sparsity = sum(c.predicted_sparsity for c in of_layers) / len(of_layers)
    log.info(
        f"{plan.out}: {len(counts)} predictors, {sizes_on_disk(predictors.nbytes, plan.out)}; on "
        f"the calibration split recall {recall:.2%} at predicted sparsity {sparsity:.2%}"
    )
    _warn_if_missed(plan, counts)


def _manifest(
    plan: TrainingPlan, store: ActivationStore, calibrated: list[Calibrated]
) -> PredictorManifest:
    recorded = store.manifest
    return PredictorManifest(
        model=recorded.model,
        fingerprint=recorded.fingerprint,
        convention=recorded.convention,
        activation=recorded.activation,
        activation_threshold=recorded.activation_threshold,
        hidden_size=recorded.hidden_size,
        ffn_width=recorded.ffn_width,
        ffn_matrices=recorded.ffn_matrices,
        dtypes=[layer.predictor.dtype for layer in calibrated],
        ranks=[layer.predictor.rank for layer in calibrated],
        calibration=[_scores(layer.counts) for layer in calibrated],
        experts=recorded.experts,
        recipe=dict(plan.options),
    )


def _scores(c: Counts) -> dict[str, float]:
    return {
        "recall": c.recall,
        "predicted_sparsity": c.predicted_sparsity,
        "true_sparsity": c.true_sparsity,
        "precision": c.precision,
    }


def _warn_if_missed(plan: TrainingPlan, counts: list[Counts]) -> None:
    """Warn about the layer furthest from its target, if it missed it by more than `MISSED`."""
    scores = {"target_recall": "recall", "target_sparsity": "predicted_sparsity"}
    for option, name in scores.items():
        target = plan.options[option]
        reached = {i: getattr(c, name) for i, c in enumerate(counts) if i not in plan.untrained}
        if target is None or all(abs(value - target) <= MISSED for value in reached.values()):
            continue
        layer = max(reached, key=lambda i: abs(reached[i] - target))
        log.warning(
            f"{ffn_name(layer, plan.shape.experts)}: calibration reached a "
            f"{name.replace('_', ' ')} of {reached[layer]:.4f}, expected {target}; train with a "
            "larger --rank, more --epochs or more tokens"
        )


def finished_predictors(request: TrainingRequest) -> PredictorSet:
    """Load the predictors of an earlier run.

    Raises:
        InputError: They were trained with other options, or for another model.
    """
    out, fingerprint = request.out, request.fingerprint
    predictors = load_predictors(out)
    manifest = predictors.manifest
    assert manifest is not None
    changed = compare_options(manifest.recipe, request.options)
    if manifest.fingerprint != fingerprint:
        changed = [text for text in changed if not text.startswith("fingerprint ")]
        changed.append(
            "the activations come from another model" if request.store else "--model is another one"
        )
    check_unchanged(out, "finished predictors", changed, finished=True)
    unread = "" if request.store is not None else "; the corpus was not read again"
    log.info(f"{out}: already trained, {len(predictors.layers)} predictors{unread}")
    return predictors
