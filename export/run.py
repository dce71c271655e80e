"""The stage: a model and its predictors to a bundle."""

from __future__ import annotations

from pathlib import Path

import torch

from sparsecast.collect.store.firing import check_firing
from sparsecast.collect.store.store import ActivationStore
from sparsecast.core.disk import check_disk_space, describe_space, explain_full_disk
from sparsecast.core.errors import InputError
from sparsecast.core.files import check_new_folder, new_folder, write_text
from sparsecast.core.lock import lock_folder
from sparsecast.core.messages import log
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.families import lost_threshold_warning
from sparsecast.core.progress import progress_bar
from sparsecast.core.torch_files import save_torch
from sparsecast.export.bundle import BESIDE, GPUIDX_SUFFIX, SUFFIX, file_name
from sparsecast.export.card import foreign_note, model_card, relu_note, split_note, window_note
from sparsecast.export.config import ExportConfig
from sparsecast.export.finished import find_finished, recipe_of, recipe_text
from sparsecast.export.plan import predictors_for
from sparsecast.export.traffic import Traffic, traffic_of
from sparsecast.export.write.convert import Planned
from sparsecast.export.write.gpuidx import write_gpuidx
from sparsecast.export.write.hot_cold import Split, check_width, split_for
from sparsecast.export.write.hparams import HParams
from sparsecast.export.write.model_config import read_hyper
from sparsecast.export.write.vocab import Vocabulary, read_vocabulary
from sparsecast.export.write.vram import budget_for
from sparsecast.export.write.writer import plan, write_model
from sparsecast.predictors.checkpoint import PredictorSet

AFTER = "nothing is left behind: make room and run the same command again"
EXACT = 2**24
"""float32 holds every whole number up to here."""


def export(cfg: ExportConfig) -> Path:
    """Write the bundle and return the path of its GGUF file; one that is there and was made of the
    same inputs with the same options is kept.

    Memory: see `model_gguf`; predictors stay memory maps where their files hold f16, q8_0 or q4_0.

    Raises:
        InputError: See `read_hyper`, `read_vocabulary` and `predictors_for`; activations of
            another model; too little space on the disk; an FFN that does not divide into the
            blocks of --vram-budget; another export that is writing `cfg.out`; a bundle there
            that was made otherwise.
        OSError: The disk filled up meanwhile; nothing is left behind.
    """
    with lock_folder(check_new_folder(cfg.out, replaces=f"*{SUFFIX}", beside=BESIDE), "export"):
        return _export(cfg)


def _export(cfg: ExportConfig) -> Path:
    checkpoint = Checkpoint(cfg.model)
    hyper = read_hyper(checkpoint, cfg.activation_threshold)
    vocabulary = read_vocabulary(checkpoint, hyper.vocab)
    predictors, foreign = predictors_for(cfg.predictors, checkpoint, hyper, force=cfg.force)
    counts = None if cfg.activations is None else _counts(cfg.activations, checkpoint, hyper)
    file = file_name(checkpoint.source)
    recipe = recipe_of(cfg, checkpoint.fingerprint, hyper, vocabulary, predictors)
    if (there := find_finished(cfg.out, file, recipe)) is not None:
        log.info(f"{cfg.out}: already exported")
        return there
    tensors = plan(checkpoint, hyper, predictors, cfg.dtype)
    split = _split(cfg, hyper, tensors, counts)
    total = sum(t.nbytes for t in tensors)
    need = _check_room(cfg.out, total, predictors)
    traffic = _traffic(tensors, predictors)

    with (
        explain_full_disk(cfg.out, need, "the bundle", lambda: AFTER),
        new_folder(cfg.out, replaces=f"*{SUFFIX}", beside=BESIDE) as folder,
    ):
        with progress_bar("export", total) as progress:
            write_model(
                folder / file,
                tensors,
                hyper,
                vocabulary,
                name=file.removesuffix(SUFFIX),
                fingerprint=checkpoint.fingerprint,
                threshold=predictors.threshold,
                dtype=cfg.dtype,
                recipe=recipe_text(recipe),
                wrote=progress.advance,
            )
        (folder / "predictor").mkdir()
        predictors.write_into(folder / "predictor")
        if counts is not None:
            _write_counts(folder / "activation", counts)
        if split is not None:
            write_gpuidx(folder / (file + GPUIDX_SUFFIX), split)
        card = model_card(file, hyper, vocabulary, predictors, foreign, cfg, split, traffic)
        write_text(folder / "README.md", card)
    _tell_notes(cfg, checkpoint, hyper, vocabulary, foreign)
    log.info(f"{cfg.out / file}: {total / 2**20:,.1f} MiB of weights in {cfg.dtype}")
    if traffic is not None:
        log.info(f"FFN traffic by the calibration split: {traffic}")
    if split is not None:
        (log.info if split.neurons else log.warning)(split_note(split))
    return cfg.out / file


def _split(
    cfg: ExportConfig, hyper: HParams, tensors: list[Planned], counts: list[torch.Tensor] | None
) -> Split | None:
    """The neurons that --vram-budget puts on the GPU; None where it is not given."""
    if cfg.vram_budget is None or counts is None:
        return None
    check_width(hyper.ffn)
    return split_for(budget_for(cfg.vram_budget, cfg.vram_context, tensors, hyper), counts)


def _check_room(out: Path, total: int, predictors: PredictorSet) -> int:
    """Bytes of a bundle whose file holds `total` bytes of weights; refused where the disk has no
    room for them."""
    need = total + sum(w.numel() * w.element_size() for p in predictors.layers for w in p.weights)
    check_disk_space(out, need, "the bundle")
    log.info(f"{out}: the bundle takes {describe_space(out, need)}")
    return need


def _tell_notes(
    cfg: ExportConfig,
    checkpoint: Checkpoint,
    hyper: HParams,
    vocabulary: Vocabulary,
    foreign: list[str],
) -> None:
    """Where the bundle is not what the model is, or may not be."""
    if cfg.activation_threshold is None:
        lost = lost_threshold_warning(checkpoint.config, checkpoint.source)
        if lost is not None:
            log.warning(lost)
    if foreign:
        log.warning(foreign_note(foreign))
    if hyper.activation.threshold > 0:
        log.warning(relu_note(hyper))
    if hyper.window is not None:
        log.warning(window_note(hyper))
    for note in vocabulary.notes:
        log.warning(note)


def _traffic(tensors: list[Planned], predictors: PredictorSet) -> Traffic | None:
    """What decoding reads; None where the predictors came without scores."""
    if predictors.manifest is None:
        return None
    stored = {t.name: (t.kind.name.lower(), t.shape) for t in tensors}
    return traffic_of(stored, predictors.manifest.calibration)


def _counts(folder: Path, checkpoint: Checkpoint, hyper: HParams) -> list[torch.Tensor]:
    """Per layer (F,) int64: on how many recorded tokens each neuron fired."""
    store = ActivationStore(folder)
    manifest = store.manifest
    if manifest.fingerprint != checkpoint.fingerprint:
        raise InputError(
            f"{folder}: was recorded from {manifest.model} (fingerprint {manifest.fingerprint}), "
            f"but {checkpoint.source} has {checkpoint.fingerprint}; collect from this model"
        )
    if manifest.layers != list(range(hyper.layers)):
        raise InputError(
            f"{folder}: holds layers {manifest.layers}, expected all {hyper.layers}; collect again "
            "without --layers"
        )
    theirs, ours = manifest.rule, hyper.activation
    if (theirs.on_up, theirs.threshold) != (ours.on_up, ours.threshold):
        raise InputError(
            f"{folder}: was recorded with {theirs}, but the file is of {ours}; collect with the "
            "--activation-threshold of this export"
        )
    stats = store.stats()
    check_firing(stats, manifest.layers, str(folder))
    seen = [split for split in stats.splits() if split != "held-out"]
    return [stats.fired(layer, seen) for layer in manifest.layers]


def _write_counts(folder: Path, counts: list[torch.Tensor]) -> None:
    """In float32, which is exact up to 2^24; in float64 where a layer's neuron fired more often.

    PowerInfer's solver sums blocks of counts in the file's dtype: float16 would overflow, and it
    turns int64 into float32.
    """
    folder.mkdir()
    for i, count_F in enumerate(counts):
        dtype = torch.float32 if int(count_F.max()) <= EXACT else torch.float64
        save_torch(count_F.to(dtype), folder / f"activation_{i}.pt")
