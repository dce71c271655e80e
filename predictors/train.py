"""The stage: an activation store, or a running model, to a folder of calibrated predictors."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch

from sparsecast.collect.output import lock_output, output_folder
from sparsecast.collect.store.firing import check_firing
from sparsecast.collect.store.store import ActivationStore
from sparsecast.core.disk import explain_full_disk
from sparsecast.core.distributed import DistributedContext, distributed_context
from sparsecast.core.errors import InputError
from sparsecast.core.manifests import MANIFEST
from sparsecast.core.messages import log
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.loading import pick_device
from sparsecast.core.options import compare_options
from sparsecast.predictors.calibration.calibrate import Calibrated
from sparsecast.predictors.calibration.rank_selection import check_traffic, default_dtype, ranks_for
from sparsecast.predictors.checkpoint import PredictorSet, load_predictors
from sparsecast.predictors.config import TrainConfig
from sparsecast.predictors.formats import check_widths
from sparsecast.predictors.manifest import PredictorManifest
from sparsecast.predictors.metrics import Counts
from sparsecast.predictors.recorded_model import check_recorded
from sparsecast.predictors.report.wording import both_sizes
from sparsecast.predictors.training.layer_parallel import share_of
from sparsecast.predictors.training.needs import disk_bytes, held_bytes, tell_needs
from sparsecast.predictors.training.online import running
from sparsecast.predictors.training.recipes import RECIPES, Job
from sparsecast.predictors.training.source import Recorded, Source
from sparsecast.predictors.training.trainer import (
    LAST,
    Run,
    check_unfinished,
    clear_unfinished,
    finish_logs,
    work_folder,
)

MISSED = 0.01
FITTED = ("train", "calibration")


def train(cfg: TrainConfig) -> PredictorSet:
    """Train, calibrate and save the predictors of every layer.

    Training reads the train split and calibration the calibration split; held-out is not touched.
    A killed run goes on from its last finished epoch; one whose objective could not be met is asked
    for another without training again. Under torchrun the processes share the layers, or with
    `cfg.data_parallel` the batches, and all of them return the same predictors.

    Memory: the predictors of a process's layers with gradients, two AdamW moments and the best
    epoch (20 bytes a weight), four batches of these layers, and one (D, D) and one (F, D) matrix;
    the store is read through memory maps. Rounding to a quantized format takes another 8 bytes a
    weight. The leading process holds the trained predictors of all layers at the end. For a
    running model see online.py.

    Raises:
        InputError: No finished store there, one that does not cover every layer, a finished or
            unfinished run for `cfg.out` that was made with other options, a rank that the format
            cannot store, or an objective that cannot be met.
    """
    with distributed_context() as processes, ExitStack() as held:
        with processes.together():
            cfg = replace(cfg, out=output_folder(cfg.out), device=processes.device(cfg.device))
            device = pick_device(cfg.device)
            store = None if cfg.activations is None else _every_layer(cfg.activations)
            if (cfg.out / MANIFEST).is_file():
                return _finished(cfg, store, processes)
            if processes.leads:
                held.enter_context(lock_output(cfg.out, "training"))
            if store is None:
                _check_running(cfg, processes)
        try:
            source = running(cfg) if store is None else Recorded(store)
            with processes.together():
                job, recipe, need = _prepare(cfg, source, device, processes)
            with explain_full_disk(cfg.out, need, "training", lambda: _left(cfg, processes)):
                calibrated = RECIPES[cfg.recipe](job)
                with processes.together():
                    if calibrated is not None:
                        _finish(cfg, source.store, recipe, calibrated)
        except BaseException:
            _left(cfg, processes)
            raise
        return load_predictors(cfg.out)


def _left(cfg: TrainConfig, processes: DistributedContext) -> str:
    """What a run that failed has left, once what nobody can use is gone."""
    if processes.leads:
        clear_unfinished(cfg.out)
    if any(work_folder(cfg.out).glob(LAST)):
        return "the last finished epoch is kept: make room, and the same command goes on from there"
    return "no epoch was finished yet, nothing is left behind: make room and run it again"


def _check_running(cfg: TrainConfig, processes: DistributedContext) -> None:
    """What can be refused before a running model's calibration documents are recorded."""
    assert cfg.model is not None
    checkpoint = Checkpoint(cfg.model)
    checkpoint.check()
    config: Any = checkpoint.config
    dtype = default_dtype(cfg, config.hidden_size)
    if cfg.rank is not None:
        check_widths(dtype, rank=cfg.rank, hidden_size=config.hidden_size)
    share_of(range(config.num_hidden_layers), processes, cfg.data_parallel)
    recipe = _recipe(cfg, dtype, checkpoint.fingerprint, None, processes)
    check_unfinished(work_folder(cfg.out), _training(recipe, processes))
    if processes.leads:
        clear_unfinished(cfg.out)


def _training(recipe: dict[str, Any], processes: DistributedContext) -> dict[str, Any]:
    """What a resumed run must share: another objective needs no other training, unless best epochs
    are chosen by it."""
    free = ("target_perplexity", "traffic_budget")
    return {
        **{name: value for name, value in recipe.items() if name not in free},
        "processes": processes.size,
    }


def _prepare(
    cfg: TrainConfig, source: Source, device: torch.device, processes: DistributedContext
) -> tuple[Job, dict[str, Any], int]:
    """Everything that can be refused before training; the bytes of disk that it takes."""
    store = source.store
    dtype = default_dtype(cfg, store.manifest.hidden_size)
    recipe = _recipe(cfg, dtype, store.manifest.fingerprint, store, processes)
    training = _training(recipe, processes)
    check_unfinished(work_folder(cfg.out), training)
    if cfg.model and cfg.activations:
        check_recorded(cfg.model, store)
    if cfg.activations and processes.leads:
        check_firing(store.stats(), store.manifest.layers, str(cfg.activations), FITTED)
        store.check("calibration")  # else damage there would end the first epoch
    all_of_them = cfg.data_parallel or cfg.recipe == "svd"
    layers = share_of(store.manifest.layers, processes, all_of_them)
    L.seed_everything(cfg.seed, verbose=False)
    ranks = ranks_for(cfg, store, dtype, device)
    for rank in set(ranks):
        check_widths(dtype, rank=rank, hidden_size=store.manifest.hidden_size)
    check_traffic(cfg, store, dtype, ranks)
    made = store.manifest
    shape = made.hidden_size, made.ffn_width
    need = disk_bytes(cfg, dtype, ranks, shape, split=len(layers) < len(ranks))
    held = held_bytes(work_folder(cfg.out), LAST)
    tell_needs(cfg, need, held, dtype, [ranks[layer] for layer in layers], shape)
    return Job(cfg, source, dtype, ranks, Run(layers, device, processes, training)), recipe, need


def _every_layer(folder: Path) -> ActivationStore:
    store = ActivationStore(folder)
    if (layers := store.manifest.layers) != list(range(len(layers))):
        raise InputError(
            f"{folder}: holds layers {layers}, but PowerInfer needs every layer from 0 on; "
            "collect without --layers"
        )
    return store


def _finish(
    cfg: TrainConfig,
    store: ActivationStore,
    recipe: dict[str, Any],
    calibrated: list[Calibrated],
) -> None:
    predictors = PredictorSet(
        [layer.predictor for layer in calibrated], 0.0, _manifest(store, recipe, calibrated)
    )
    predictors.save(cfg.out)
    finish_logs(work_folder(cfg.out), cfg.out)
    _summary(cfg, predictors, [layer.counts for layer in calibrated])
    _tell_missed(cfg, [layer.counts for layer in calibrated])


def _recipe(
    cfg: TrainConfig,
    dtype: str,
    fingerprint: str,
    store: ActivationStore | None,
    processes: DistributedContext,
) -> dict[str, Any]:
    """What two runs must share to be the same.

    Args:
        store: None where a running model's calibration documents are not recorded any more.
    """
    options = asdict(cfg)
    for name in ("activations", "out", "device", "model", "tokens", "seq_len"):
        options.pop(name)
    recipe = {
        **options,
        "predictor_dtype": dtype,
        "epochs": cfg.steps,
        "batch_size": cfg.tokens_per_step,
        "lr": cfg.peak_lr,
        "fingerprint": fingerprint,
    }
    if cfg.activations is None:
        steps = cfg.steps_per_epoch(processes.size if cfg.data_parallel else 1) * cfg.steps
        tokens = steps * cfg.tokens_per_step * (processes.size if cfg.data_parallel else 1)
        recipe |= {"train_tokens": tokens, "seq_len": cfg.document_len}
    if store is not None:
        recipe["calibration_tokens"] = store.manifest.tokens("calibration")
    if store is not None and cfg.activations is not None:
        recipe |= {
            "activations": store.checksum,
            "corpus": store.manifest.corpus,
            "train_tokens": store.manifest.tokens("train"),
        }
    return recipe


def _manifest(
    store: ActivationStore, recipe: dict[str, Any], calibrated: list[Calibrated]
) -> PredictorManifest:
    made = store.manifest
    return PredictorManifest(
        model=made.model,
        fingerprint=made.fingerprint,
        convention=made.convention,
        activation=made.activation,
        activation_threshold=made.activation_threshold,
        hidden_size=made.hidden_size,
        ffn_width=made.ffn_width,
        ffn_matrices=made.ffn_matrices,
        dtypes=[layer.predictor.dtype for layer in calibrated],
        ranks=[layer.predictor.rank for layer in calibrated],
        calibration=[_scores(layer.counts) for layer in calibrated],
        recipe=recipe,
    )


def _scores(c: Counts) -> dict[str, float]:
    return {
        "recall": c.recall,
        "predicted_sparsity": c.predicted_sparsity,
        "true_sparsity": c.true_sparsity,
        "precision": c.precision,
    }


def _finished(
    cfg: TrainConfig, store: ActivationStore | None, processes: DistributedContext
) -> PredictorSet:
    predictors = load_predictors(cfg.out)
    made = predictors.manifest
    assert made is not None
    if store is not None:
        fingerprint = store.manifest.fingerprint
    else:
        assert cfg.model is not None
        fingerprint = Checkpoint(cfg.model).fingerprint
    recipe = _recipe(cfg, default_dtype(cfg, made.hidden_size), fingerprint, store, processes)
    if not compare_options(made.recipe, recipe):  # ended between its last two steps
        finish_logs(work_folder(cfg.out), cfg.out)
    changed = compare_options(made.recipe, {k: v for k, v in recipe.items() if k != "fingerprint"})
    if made.fingerprint != fingerprint:
        changed.append(
            "the activations come from another model" if store else "--model is another one"
        )
    if changed:
        raise InputError(
            f"{cfg.out}: holds finished predictors made differently ({'; '.join(changed)}); choose "
            "another --out or remove the folder"
        )
    unread = "" if store is not None else "; the corpus was not read again"
    log.info(f"{cfg.out}: already trained, {len(predictors.layers)} layers{unread}")
    return predictors


def _tell_missed(cfg: TrainConfig, counts: list[Counts]) -> None:
    """A word where calibration came no nearer to the objective than `MISSED`."""
    names = {"target_recall": "recall", "target_sparsity": "predicted_sparsity"}
    for option, name in names.items():
        wanted = getattr(cfg, option)
        reached = [getattr(c, name) for c in counts]
        if wanted is None or all(abs(value - wanted) <= MISSED for value in reached):
            continue
        layer = max(range(len(reached)), key=lambda i: abs(reached[i] - wanted))
        log.warning(
            f"layer {layer} came to a {name.replace('_', ' ')} of {reached[layer]:.4f}, {wanted} "
            "was asked for: a larger --rank, more --epochs or more tokens bring it nearer"
        )


def _summary(cfg: TrainConfig, predictors: PredictorSet, counts: list[Counts]) -> None:
    recall = sum(c.recall for c in counts) / len(counts)
    sparsity = sum(c.predicted_sparsity for c in counts) / len(counts)
    log.info(
        f"{cfg.out}: {len(counts)} predictors, {both_sizes(predictors.nbytes, cfg.out)}; on the "
        f"calibration split recall {recall:.2%} at predicted sparsity {sparsity:.2%}"
    )
