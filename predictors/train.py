"""The stage: an activation store to a folder of calibrated predictors."""

from __future__ import annotations

import signal
from dataclasses import asdict
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar
from torch.utils.data import DataLoader

from sparsecast.collect.errors import InputError
from sparsecast.collect.models import pick_device
from sparsecast.collect.progress import console
from sparsecast.collect.store import ActivationStore
from sparsecast.predictors.bias import BIAS_UNITS
from sparsecast.predictors.calibrate import calibrate
from sparsecast.predictors.checkpoint import PredictorManifest, PredictorSet, load_predictors
from sparsecast.predictors.config import DEFAULT_RECALL, TrainConfig
from sparsecast.predictors.data import TokenBlocks
from sparsecast.predictors.metrics import Counts
from sparsecast.predictors.module import PredictorModule
from sparsecast.predictors.warm_start import warm_start


def train(cfg: TrainConfig) -> PredictorSet:
    """Train, calibrate and save the predictors of every recorded layer.

    Training reads the train split and calibration the calibration split; held-out is not touched.

    Memory: the predictors with gradients, two AdamW moments and the best epoch (20 bytes a
    weight), one batch of all layers, and one (D, D) matrix; the store is read through memory maps.

    Raises:
        InputError: No finished store there, one that does not cover every layer, or a finished
            predictor folder under `cfg.out` that was made with other options.
    """
    store = ActivationStore(cfg.activations)
    rank = cfg.rank or -(-store.manifest.hidden_size * 3 // 256) * 32
    recipe = _recipe(cfg, store, rank)
    if (cfg.out / "manifest.json").is_file():
        return _finished(cfg, recipe, store)
    if (layers := store.manifest.layers) != list(range(len(layers))):
        raise InputError(
            f"{cfg.activations}: holds layers {layers}, but PowerInfer needs every layer from 0 "
            "on; collect without --layers"
        )
    L.seed_everything(cfg.seed, verbose=False)
    module = _fit(cfg, store, rank)
    calibrated = [
        calibrate(predictor, store, layer, cfg)
        for layer, predictor in enumerate(module.predictors())
    ]
    predictors = PredictorSet(
        [predictor for predictor, _ in calibrated],
        0.0,
        _manifest(store, rank, recipe, [counts for _, counts in calibrated]),
    )
    predictors.save(cfg.out)
    _summary(cfg, [counts for _, counts in calibrated])
    return predictors


def _fit(cfg: TrainConfig, store: ActivationStore, rank: int) -> PredictorModule:
    module = PredictorModule(cfg, warm_start(store, rank - BIAS_UNITS))
    on_gpu = pick_device(cfg.device).type == "cuda"
    trainer = L.Trainer(
        max_epochs=cfg.epochs,
        accelerator="gpu" if on_gpu else "cpu",
        devices=1,
        precision="bf16-mixed" if on_gpu else "32-true",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[RichProgressBar(refresh_rate=5)],
    )
    train_data = TokenBlocks(store, "train", cfg.batch_size, cfg.seed)
    calibration_data = TokenBlocks(store, "calibration", cfg.batch_size)
    handler = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(
            module,
            DataLoader(train_data, batch_size=None),
            DataLoader(calibration_data, batch_size=None),
        )
    except SystemExit as stop:  # Lightning's end of an interrupt, with the signal left ignored
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from stop
    return module


def _recipe(cfg: TrainConfig, store: ActivationStore, rank: int) -> dict[str, Any]:
    options = asdict(cfg)
    for name in ("activations", "out", "device"):
        options.pop(name)
    if cfg.target_sparsity is None:
        options["target_recall"] = cfg.target_recall or DEFAULT_RECALL
    return {
        **options,
        "rank": rank,
        "corpus": store.manifest.corpus,
        "train_tokens": store.manifest.tokens("train"),
        "calibration_tokens": store.manifest.tokens("calibration"),
    }


def _manifest(
    store: ActivationStore, rank: int, recipe: dict[str, Any], counts: list[Counts]
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
        dtype="f16",
        ranks=[rank] * len(counts),
        calibration=[
            {
                "recall": c.recall,
                "predicted_sparsity": c.predicted_sparsity,
                "true_sparsity": c.true_sparsity,
                "precision": c.precision,
            }
            for c in counts
        ],
        recipe=recipe,
    )


def _finished(cfg: TrainConfig, recipe: dict[str, Any], store: ActivationStore) -> PredictorSet:
    predictors = load_predictors(cfg.out)
    made = predictors.manifest
    assert made is not None
    changed = [
        f"{name} was {made.recipe.get(name)!r}, now {value!r}"
        for name, value in recipe.items()
        if made.recipe.get(name) != value
    ]
    if made.fingerprint != store.manifest.fingerprint:
        changed.append("the activations come from another model")
    if changed:
        raise InputError(
            f"{cfg.out}: holds finished predictors made differently ({'; '.join(changed)}); choose "
            "another --out or remove the folder"
        )
    console.print(f"{cfg.out}: already trained, {len(predictors.layers)} layers")
    return predictors


def _summary(cfg: TrainConfig, counts: list[Counts]) -> None:
    recall = sum(c.recall for c in counts) / len(counts)
    sparsity = sum(c.predicted_sparsity for c in counts) / len(counts)
    console.print(
        f"{cfg.out}: {len(counts)} predictors; on the calibration split recall {recall:.2%} at "
        f"predicted sparsity {sparsity:.2%}"
    )
