"""Run a Lightning module over a source of batches: logs, checkpoints, and resumption.

While a run is under way its folder has a hidden sibling, `.<name>.train`, with the last epoch's
checkpoint and, for every start, logs/version_<n>: metrics.csv and TensorBoard's event file. A
killed run goes on from the last finished epoch; since the order of the data follows from seed and
epoch alone, it ends as an uninterrupted one would have. The logs move into the finished folder.
Processes that share the layers out have a checkpoint each; the logs are the leading one's.
"""

from __future__ import annotations

import json
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch.utils.data import DataLoader

from sparsecast.core.distributed import DistributedContext, int_from_environment
from sparsecast.core.errors import InputError
from sparsecast.core.files import read_json, write_json
from sparsecast.core.interrupts import interrupt_like
from sparsecast.core.lightning import (
    StagedCheckpoints,
    TrainingBar,
    cluster_environment,
    quiet_lightning,
)
from sparsecast.core.messages import log
from sparsecast.core.options import compare_options
from sparsecast.predictors.config import TrainConfig
from sparsecast.predictors.training.data import TokenBlocks
from sparsecast.predictors.training.source import Batches, Source

RECIPE = "recipe.json"
LOGS = "logs"
LAST = "last*.ckpt"


class Run(NamedTuple):
    """Where a recipe runs, and with whom."""

    layers: list[int]
    """That this process trains."""
    device: torch.device
    team: DistributedContext
    shared: dict[str, Any]
    """What a resumed run must share."""


def work_folder(out: Path) -> Path:
    """Where an unfinished run lives."""
    return out.with_name(f".{out.name}.train")


class _Epochs(Callback):
    """Tell the data which epoch begins, and put a checkpoint in place, whole, when it ends."""

    def __init__(self, data: Batches, path: Path) -> None:
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
        trainer.save_checkpoint(self._path)


def fit(cfg: TrainConfig, source: Source, module: L.LightningModule, run: Run) -> None:
    """Train `module`, the predictors of `run.layers`, in place, from its last checkpoint where
    `cfg.out` has an unfinished run.

    Raises:
        InputError: An unfinished run that was begun with another recipe.
        KeyboardInterrupt: At Ctrl-C; the checkpoint stays.
    """
    team, device = run.team, run.device
    work = work_folder(cfg.out)
    with team.together():
        if team.leads:
            _begin(work, run.shared)
    last = checkpoint_of(cfg, run)
    resume = last if last.is_file() else None
    on_gpu = device.type == "cuda"
    share = (team.rank, team.size) if cfg.data_parallel else (0, 1)
    train_data: Any = source.batches(cfg, run.layers, device, share)
    calibration_data = TokenBlocks(
        source.store, "calibration", cfg.tokens_per_step, layers=run.layers, for_gpu=on_gpu
    )
    callbacks: list[Callback] = [_Epochs(train_data, last)]
    handler = signal.getsignal(signal.SIGINT)
    try:
        with quiet_lightning(), _quiet_threads():
            _trainer(cfg, run, callbacks).fit(
                module,
                DataLoader(train_data, batch_size=None),
                DataLoader(calibration_data, batch_size=None),
                ckpt_path=resume,
                weights_only=True,
            )
    except SystemExit as stop:  # Lightning's end of an interrupt, with the signal left ignored
        signal.signal(signal.SIGINT, handler)
        kept = last.is_file()
        left = (
            "the same command goes on from the last finished epoch"
            if kept
            else "no epoch was finished yet, nothing is left behind"
        )
        raise interrupt_like(stop, f"{cfg.out}: interrupted; {left}") from stop


def _trainer(cfg: TrainConfig, run: Run, callbacks: list[Callback]) -> L.Trainer:
    """The leading process shows a bar and keeps the logs, one version for every start."""
    team, work = run.team, work_folder(cfg.out)
    start = len(list((work / LOGS).glob("version_*")))
    loggers: Any = [
        CSVLogger(work, name=LOGS, version=start),
        TensorBoardLogger(work, name=LOGS, version=start),
    ]
    progress = [TrainingBar("train")] if team.leads else []
    return L.Trainer(
        max_epochs=cfg.steps,
        precision="bf16-mixed" if run.device.type == "cuda" else "32-true",
        logger=loggers if team.leads else False,
        log_every_n_steps=10,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        callbacks=[*callbacks, *progress],
        plugins=[cluster_environment(), StagedCheckpoints()],
        **_placed(run.device, team, cfg.data_parallel),
    )


@contextmanager
def _quiet_threads() -> Iterator[None]:
    """TensorBoard's thread hands a full disk on to whoever logs next, and prints it besides."""
    before = threading.excepthook

    def tell(args: threading.ExceptHookArgs) -> None:
        if not isinstance(args.exc_value, OSError):
            before(args)

    threading.excepthook = tell
    try:
        yield
    finally:
        threading.excepthook = before


def checkpoint_of(cfg: TrainConfig, run: Run) -> Path:
    """Where this process puts its last epoch."""
    split = run.team.size > 1 and not cfg.data_parallel
    return work_folder(cfg.out) / (f"last-{run.team.rank}.ckpt" if split else "last.ckpt")


def clear_unfinished(out: Path) -> None:
    """Remove what a run has left that has not finished an epoch."""
    if not any(work_folder(out).glob(LAST)):
        shutil.rmtree(work_folder(out), ignore_errors=True)


def _placed(device: torch.device, team: DistributedContext, data_parallel: bool) -> dict[str, Any]:
    """Trainer arguments: one device, or all processes on shares of the same batches."""
    on_gpu = device.type == "cuda"
    accelerator = "gpu" if on_gpu else "cpu"
    if team.size > 1 and data_parallel:
        here = int_from_environment("LOCAL_WORLD_SIZE", team.size, least=1)
        group = None
        if on_gpu:  # the team itself talks on gloo
            torch.cuda.set_device(device)
            group = torch.distributed.new_group(backend="nccl")
        return {
            "accelerator": accelerator,
            "strategy": DDPStrategy(process_group=group),
            "devices": here,
            "num_nodes": team.size // here,
        }
    if on_gpu:
        return {"accelerator": accelerator, "devices": [device.index or 0]}
    return {"strategy": SingleDeviceStrategy(device, accelerator=CPUAccelerator())}


def check_unfinished(work: Path, recipe: dict[str, Any]) -> bool:
    """Whether there is a run to go on with; one that was begun with another recipe is refused."""
    if not any(work.glob(LAST)):
        return False
    made = read_json(work / RECIPE, "the recipe of an unfinished `sparsecast train`")
    now = recipe.get("processes")
    if (was := made.get("processes", now)) != now:
        raise InputError(
            f"{work}: holds an unfinished run of {was} processes, but there are {now}; start it "
            f"with torchrun --nproc-per-node {was} again, or remove that folder"
        )
    if changed := compare_options(made, json.loads(json.dumps(recipe))):
        raise InputError(
            f"{work}: holds an unfinished run made differently ({'; '.join(changed)}); repeat "
            "the options it was started with, or remove that folder"
        )
    return True


def _begin(work: Path, recipe: dict[str, Any]) -> None:
    """Make the folder of a fresh run, or accept the one of an interrupted run."""
    begun = check_unfinished(work, recipe)
    for leftover in (*work.glob("*.part"), *work.glob("layer-*.pt")):
        leftover.unlink()
    if begun:
        log.info("resuming from the last finished epoch")
        return
    work.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(work / LOGS, ignore_errors=True)
    write_json(work / RECIPE, recipe)


def finish_logs(work: Path, folder: Path) -> None:
    """Move the logs of a finished run into its folder, and remove what else is left of it."""
    if (work / LOGS).is_dir():
        shutil.move(work / LOGS, folder / LOGS)
    shutil.rmtree(work, ignore_errors=True)
