"""Run a Lightning module over an activation store: logs, checkpoints, and resumption.

While a run is under way its folder has a hidden sibling, `.<name>.train`, with the last epoch's
checkpoint and, for every start, logs/version_<n>: metrics.csv and TensorBoard's event file. A
killed run goes on from the last finished epoch; since the order of the data follows from seed and
epoch alone, it ends as an uninterrupted one would have. The logs move into the finished folder.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.data import DataLoader

from sparsecast.collect.atomic import read_json, write_json
from sparsecast.collect.errors import InputError
from sparsecast.collect.progress import console
from sparsecast.collect.store import ActivationStore
from sparsecast.predictors.config import TrainConfig
from sparsecast.predictors.data import TokenBlocks

RECIPE = "recipe.json"
LOGS = "logs"
LAST = "last.ckpt"


def work_folder(out: Path) -> Path:
    """Where an unfinished run lives."""
    return out.with_name(f".{out.name}.train")


class _Epochs(Callback):
    """Tell the data which epoch begins, and put a checkpoint in place, whole, when it ends."""

    def __init__(self, data: TokenBlocks, path: Path) -> None:
        self._data = data
        self._path = path

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._data.epoch = trainer.current_epoch

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not all(bool(weight.isfinite().all()) for weight in pl_module.parameters()):
            raise InputError(
                f"training diverged in epoch {trainer.current_epoch}: a weight is no number; "
                "choose a smaller --lr"
            )
        part = self._path.with_suffix(".part")
        trainer.save_checkpoint(part)
        os.replace(part, self._path)


def fit(
    cfg: TrainConfig,
    store: ActivationStore,
    module: L.LightningModule,
    device: torch.device,
    recipe: dict[str, Any],
    callbacks: list[Callback] | None = None,
) -> None:
    """Train `module` in place, from its last checkpoint where `cfg.out` has an unfinished run.

    Args:
        recipe: What a resumed run must share.

    Raises:
        InputError: An unfinished run that was begun with another recipe.
        KeyboardInterrupt: At Ctrl-C; the checkpoint stays.
    """
    work = work_folder(cfg.out)
    resume = _begin(work, recipe)
    on_gpu = device.type == "cuda"
    train_data = TokenBlocks(store, "train", cfg.tokens_per_step, cfg.seed, for_gpu=on_gpu)
    calibration_data = TokenBlocks(store, "calibration", cfg.tokens_per_step, for_gpu=on_gpu)
    start = len(list((work / LOGS).glob("version_*")))
    trainer = L.Trainer(
        max_epochs=cfg.steps,
        accelerator="gpu" if on_gpu else "cpu",
        devices=1,
        precision="bf16-mixed" if on_gpu else "32-true",
        logger=[
            CSVLogger(work, name=LOGS, version=start),
            TensorBoardLogger(work, name=LOGS, version=start),
        ],
        log_every_n_steps=10,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[
            RichProgressBar(refresh_rate=5),
            _Epochs(train_data, work / LAST),
            *(callbacks or []),
        ],
    )
    handler = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(
            module,
            DataLoader(train_data, batch_size=None),
            DataLoader(calibration_data, batch_size=None),
            ckpt_path=resume,
            weights_only=True,
        )
    except SystemExit as stop:  # Lightning's end of an interrupt, with the signal left ignored
        signal.signal(signal.SIGINT, handler)
        kept = (work / LAST).is_file()
        if not kept:
            shutil.rmtree(work, ignore_errors=True)
        raise KeyboardInterrupt(
            f"{cfg.out}: interrupted; "
            + (
                "the same command goes on from the last finished epoch"
                if kept
                else "no epoch was finished yet, nothing is left behind"
            )
        ) from stop


def check_unfinished(work: Path, recipe: dict[str, Any]) -> bool:
    """Whether there is a run to go on with; one that was begun with another recipe is refused."""
    if not (work / LAST).is_file():
        return False
    made = read_json(work / RECIPE, "the recipe of an unfinished `sparsecast train`")
    if changed := differing(made, json.loads(json.dumps(recipe))):
        raise InputError(
            f"{work}: holds an unfinished run made differently ({'; '.join(changed)}); repeat "
            "the options it was started with, or remove that folder"
        )
    return True


def _begin(work: Path, recipe: dict[str, Any]) -> Path | None:
    """The checkpoint to go on from; None for a fresh run, whose folder is made."""
    if check_unfinished(work, recipe):
        console.print("resuming from the last finished epoch")
        return work / LAST
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    write_json(work / RECIPE, recipe)
    return None


def differing(made: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """What two recipes disagree on."""
    return [
        f"{name} was {made.get(name)!r}, now {value!r}"
        for name, value in asked.items()
        if made.get(name) != value
    ]


def finish_logs(work: Path, folder: Path) -> None:
    """Move the logs of a finished run into its folder, and remove what else is left of it."""
    if (work / LOGS).is_dir():
        shutil.move(work / LOGS, folder / LOGS)
    shutil.rmtree(work, ignore_errors=True)
