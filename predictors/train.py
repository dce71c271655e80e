"""The stage: an activation store to a folder of calibrated predictors."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import lightning as L

from sparsecast.collect.errors import InputError
from sparsecast.collect.models import pick_device
from sparsecast.collect.progress import console
from sparsecast.collect.store import ActivationStore
from sparsecast.collect.target import locked, target
from sparsecast.predictors.calibrate import Calibrated
from sparsecast.predictors.checkpoint import PredictorManifest, PredictorSet, load_predictors
from sparsecast.predictors.config import TrainConfig
from sparsecast.predictors.fit import check_unfinished, differing, finish_logs, work_folder
from sparsecast.predictors.formats import check_widths
from sparsecast.predictors.metrics import Counts
from sparsecast.predictors.recipes import RECIPES, Job
from sparsecast.predictors.recorded import check_recorded
from sparsecast.predictors.sizes import check_traffic, default_dtype, ranks_for

MISSED = 0.01


def train(cfg: TrainConfig) -> PredictorSet:
    """Train, calibrate and save the predictors of every recorded layer.

    Training reads the train split and calibration the calibration split; held-out is not touched.
    A killed run goes on from its last finished epoch; one whose objective could not be met is asked
    for another without training again.

    Memory: the predictors with gradients, two AdamW moments and the best epoch (20 bytes a
    weight), three batches of all layers, and one (D, D) and one (F, D) matrix; the store is read
    through memory maps. Rounding to a quantised format takes another 8 bytes a weight.

    Raises:
        InputError: No finished store there, one that does not cover every layer, a finished or
            unfinished run for `cfg.out` that was made with other options, a rank that the format
            cannot store, or an objective that cannot be met.
    """
    cfg = replace(cfg, out=target(cfg.out))
    store = ActivationStore(cfg.activations)
    if (layers := store.manifest.layers) != list(range(len(layers))):
        raise InputError(
            f"{cfg.activations}: holds layers {layers}, but PowerInfer needs every layer from 0 "
            "on; collect without --layers"
        )
    dtype = default_dtype(cfg, store.manifest.hidden_size)
    recipe = _recipe(cfg, store, dtype)
    if (cfg.out / "manifest.json").is_file():
        return _finished(cfg, recipe, store)
    with locked(cfg.out, "training"):
        return _train(cfg, store, dtype, recipe)


def _train(
    cfg: TrainConfig, store: ActivationStore, dtype: str, recipe: dict[str, Any]
) -> PredictorSet:
    # Another objective needs no other training, unless best epochs are chosen by it.
    training = {k: v for k, v in recipe.items() if k not in ("target_perplexity", "traffic_budget")}
    check_unfinished(work_folder(cfg.out), training)
    if cfg.model:
        check_recorded(cfg.model, store)
    device = pick_device(cfg.device)
    L.seed_everything(cfg.seed, verbose=False)
    ranks = ranks_for(cfg, store, dtype, device)
    for rank in set(ranks):
        check_widths(dtype, rank=rank, hidden_size=store.manifest.hidden_size)
    check_traffic(cfg, store, dtype, ranks)
    calibrated = RECIPES[cfg.recipe](Job(cfg, store, dtype, ranks, device, training))
    predictors = PredictorSet(
        [layer.predictor for layer in calibrated], 0.0, _manifest(store, recipe, calibrated)
    )
    predictors.save(cfg.out)
    finish_logs(work_folder(cfg.out), cfg.out)
    _summary(cfg, predictors, [layer.counts for layer in calibrated])
    _tell_missed(cfg, [layer.counts for layer in calibrated])
    return predictors


def _recipe(cfg: TrainConfig, store: ActivationStore, dtype: str) -> dict[str, Any]:
    options = asdict(cfg)
    for name in ("activations", "out", "device", "model"):
        options.pop(name)
    return {
        **options,
        "predictor_dtype": dtype,
        "epochs": cfg.steps,
        "batch_size": cfg.tokens_per_step,
        "lr": cfg.peak_lr,
        "corpus": store.manifest.corpus,
        "train_tokens": store.manifest.tokens("train"),
        "calibration_tokens": store.manifest.tokens("calibration"),
        "fingerprint": store.manifest.fingerprint,
    }


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


def _finished(cfg: TrainConfig, recipe: dict[str, Any], store: ActivationStore) -> PredictorSet:
    predictors = load_predictors(cfg.out)
    made = predictors.manifest
    assert made is not None
    if made.recipe == recipe:  # ended between its last two steps
        finish_logs(work_folder(cfg.out), cfg.out)
    changed = differing(made.recipe, {k: v for k, v in recipe.items() if k != "fingerprint"})
    if made.fingerprint != store.manifest.fingerprint:
        changed.append("the activations come from another model")
    if changed:
        raise InputError(
            f"{cfg.out}: holds finished predictors made differently ({'; '.join(changed)}); choose "
            "another --out or remove the folder"
        )
    console.print(f"{cfg.out}: already trained, {len(predictors.layers)} layers")
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
        console.print(
            f"layer {layer} came to a {name.replace('_', ' ')} of {reached[layer]:.4f}, {wanted} "
            "was asked for: a larger --rank, more --epochs or more tokens bring it nearer",
            style="yellow",
            highlight=False,
            soft_wrap=True,
        )


def _summary(cfg: TrainConfig, predictors: PredictorSet, counts: list[Counts]) -> None:
    recall = sum(c.recall for c in counts) / len(counts)
    sparsity = sum(c.predicted_sparsity for c in counts) / len(counts)
    nbytes = sum(layer.nbytes for layer in predictors.layers)
    console.print(
        f"{cfg.out}: {len(counts)} predictors, {nbytes / 2**20:,.2f} MiB; on the calibration split "
        f"recall {recall:.2%} at predicted sparsity {sparsity:.2%}"
    )
