"""The export stage: write a model and its predictors as a bundle."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sparsecast.core.disk import check_disk_space, describe_space, explain_full_disk
from sparsecast.core.dry_run import refuse_dry_run
from sparsecast.core.files import check_new_folder, new_folder, write_text
from sparsecast.core.lock import lock_folder
from sparsecast.core.messages import log
from sparsecast.core.progress import progress_bar
from sparsecast.core.torch_files import save_torch
from sparsecast.export.bundle import BESIDE, GPUIDX_SUFFIX, SUFFIX
from sparsecast.export.card import (
    mismatch_note,
    model_card,
    relu_note,
    split_note,
    text_notes,
    window_note,
)
from sparsecast.export.config import ExportConfig
from sparsecast.export.finished import find_finished
from sparsecast.export.plan import ExportPlan, plan_export
from sparsecast.export.to_gguf.run import export_gguf
from sparsecast.export.write.gpuidx import write_gpuidx
from sparsecast.export.write.writer import write_model

AFTER_FULL_DISK = "nothing is left behind: make room and run the same command again"
FLOAT32_EXACT = 2**24
"""float32 represents every integer up to here."""


def export(cfg: ExportConfig) -> Path:
    """Write the bundle and return the path of its GGUF file; with --format gguf see `export_gguf`.

    A bundle that an earlier export wrote from the same inputs with the same options is kept.
    Memory: see export/write/writer.py; predictors stay memory maps where their files hold f16,
    q8_0 or q4_0.

    Raises:
        InputError: See `plan_export`; too little space on the disk; another export writing
            `cfg.out`; a bundle there with other inputs or options.
        OSError: The disk filled up meanwhile; nothing is left behind.
    """
    refuse_dry_run(cfg.dry_run, "export.dry_run.forecast")
    if cfg.format == "gguf":
        return export_gguf(cfg)
    with lock_folder(check_new_folder(cfg.out, replaces=f"*{SUFFIX}", beside=BESIDE), "export"):
        plan = plan_export(cfg)
        if (file := find_finished(plan)) is not None:
            log.info(f"{plan.out}: already exported")
            return file
        _write(plan)
        _log_notes(plan)
        return plan.out / plan.file


def _write(plan: ExportPlan) -> None:
    """Write every file of the bundle; its folder appears complete or not at all."""
    need = bundle_bytes(plan)
    check_disk_space(plan.out, need, "the bundle")
    log.info(f"{plan.out}: the bundle takes {describe_space(plan.out, need)}")
    with (
        explain_full_disk(plan.out, need, "the bundle", lambda: AFTER_FULL_DISK),
        new_folder(plan.out, replaces=f"*{SUFFIX}", beside=BESIDE) as folder,
    ):
        with progress_bar("export", plan.weight_bytes) as progress:
            write_model(folder / plan.file, plan, wrote=progress.advance)
        (folder / "predictor").mkdir()
        plan.predictors.write_into(folder / "predictor")
        if plan.counts is not None:
            write_counts(folder / "activation", plan.counts.layers)
        if plan.split is not None:
            write_gpuidx(folder / (plan.file + GPUIDX_SUFFIX), plan.split)
        write_text(folder / "README.md", model_card(plan))
        plan.run.write(folder)


def bundle_bytes(plan: ExportPlan) -> int:
    """Return the bytes that the bundle takes: the file's tensors and the predictors' folder."""
    weights = [weight for layer in plan.predictors.layers for weight in layer.weights]
    return plan.weight_bytes + sum(w.numel() * w.element_size() for w in weights)


def write_counts(folder: Path, counts: list[Tensor]) -> None:
    """Write how often each neuron fired, one file per layer.

    Counts are float32, or float64 in a layer with a count above 2^24. PowerInfer's solver sums
    blocks of counts in the file's dtype: float16 would overflow, and it turns int64 into float32.

    Args:
        counts: Per layer (F,) int64.
    """
    folder.mkdir()
    for i, count_F in enumerate(counts):
        dtype = torch.float32 if int(count_F.max()) <= FLOAT32_EXACT else torch.float64
        save_torch(count_F.to(dtype), folder / f"activation_{i}.pt")


def _log_notes(plan: ExportPlan) -> None:
    """Log what was written, and warn where the bundle differs from the model."""
    if plan.lost_threshold is not None:
        log.warning(plan.lost_threshold)
    if plan.mismatches:
        log.warning(mismatch_note(plan.mismatches))
    if plan.hparams.activation.threshold > 0:
        log.warning(relu_note(plan.hparams))
    if plan.hparams.window is not None:
        log.warning(window_note(plan.hparams))
    for note in text_notes(plan):
        log.warning(note)
    mib = plan.weight_bytes / 2**20
    log.info(f"{plan.out / plan.file}: {mib:,.1f} MiB of weights in {plan.dtype}")
    if plan.traffic is not None:
        log.info(f"FFN traffic by the calibration split: {plan.traffic}")
    if plan.split is not None:
        (log.info if plan.split.neurons else log.warning)(split_note(plan.split))
