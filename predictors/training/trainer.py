"""Train a Lightning module on a source of batches, with logs, checkpoints and resumption.

An unfinished run keeps its files in `.<name>.train` beside its output folder: the last epoch's
checkpoint and, for every start, logs/version_<n> with metrics.csv and TensorBoard's event file. A
killed run resumes from its last finished epoch and ends with the same weights as an uninterrupted
one, because the order of the data depends only on seed and epoch. The logs move into the finished
folder. Processes that share the layers have one checkpoint each (regroup.py); only the leading one
logs.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch.utils.data import DataLoader

from sparsecast.core.distributed import check_shared, int_from_environment
from sparsecast.core.earlier_runs import check_unchanged, compare_options
from sparsecast.core.errors import InputError
from sparsecast.core.files import read_json, write_json
from sparsecast.core.interrupts import interrupt_like, stop_on_signal
from sparsecast.core.lightning import (
    StagedCheckpoints,
    StopBetweenSteps,
    TrainingBar,
    cluster_environment,
    quiet_lightning,
)
from sparsecast.core.manifests import is_count
from sparsecast.core.messages import log
from sparsecast.core.torch_files import load_state
from sparsecast.predictors.training.plan import TrainingPlan, work_folder
from sparsecast.predictors.training.regroup import PARTS, regroup, remove_divided
from sparsecast.predictors.training.resident import ResidentBlocks
from sparsecast.predictors.training.source import Batches, Source, calibration_batches

RECIPE = "recipe.json"
"""Options of an unfinished run."""
LOGS = "logs"
LAST = "last*.ckpt"
"""Checkpoints of all processes, and layers of experts whose training is done."""


class _Epochs(Callback):
    """Set the data's epoch when it begins; save a whole checkpoint when it ends."""

    def __init__(self, data: Batches, path: Path, until: int | None) -> None:
        self._data = data
        self._path = path
        self._until = until

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._data.epoch = trainer.current_epoch

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not all(bool(weight.isfinite().all()) for weight in pl_module.parameters()):
            raise InputError(
                f"training diverged in epoch {trainer.current_epoch}: a weight is NaN or infinite; "
                "choose a smaller --lr"
            )
        trainer.save_checkpoint(self._path)
        if trainer.current_epoch + 1 == self._until:
            trainer.should_stop = True


def fit(
    plan: TrainingPlan, source: Source, module: L.LightningModule, until: int | None = None
) -> None:
    """Train `module`, the predictors of `plan.own_layers`, in place.

    Resumes from `plan.checkpoint` if there is one.

    Args:
        until: Epochs after which to stop, of those that the schedule has.

    Raises:
        InputError: A damaged checkpoint, or weights that diverge.
        KeyboardInterrupt: At Ctrl-C; the last checkpoint is kept.
    """
    last = plan.checkpoint
    resume = last if last.is_file() else None
    if resume is not None:
        load_state(resume, *PARTS)
    train_data: Any = source.batches(plan)
    calibration_data = calibration_batches(source.store, plan)
    try:
        with quiet_lightning(), stop_on_signal() as stop:
            callbacks = [_Epochs(train_data, last, until), StopBetweenSteps(stop)]
            _trainer(plan, callbacks).fit(
                module,
                DataLoader(train_data, batch_size=None),
                DataLoader(calibration_data, batch_size=None),
                ckpt_path=resume,
                weights_only=True,
            )
    except SystemExit as ended:  # how Lightning ends an interrupt
        if not isinstance(ended.__context__, KeyboardInterrupt):
            raise  # of a rank that has lost another
        raise interrupt_like(ended, f"{plan.out}: interrupted; {_left(plan)}") from ended
    finally:
        for data in (train_data, calibration_data):
            if isinstance(data, ResidentBlocks):
                data.close()  # the trainer, which the module refers to, holds the data


def _left(plan: TrainingPlan) -> str:
    """Say what an interrupted run leaves behind."""
    if plan.checkpoint.is_file():
        return "repeat the command to resume from the last finished epoch"
    if any(plan.work.glob(LAST)):
        return "what other layers have finished is kept, repeat the command to go on from there"
    return "no epoch was finished yet, nothing is left behind"


def _trainer(plan: TrainingPlan, callbacks: list[Callback]) -> L.Trainer:
    """Only the leading process shows a bar and writes logs, a new version for every start."""
    start = len(list((plan.work / LOGS).glob("version_*")))
    loggers: Any = [
        CSVLogger(plan.work, name=LOGS, version=start),
        TensorBoardLogger(plan.work, name=LOGS, version=start),
    ]
    leads = plan.context.leads
    progress = [TrainingBar("train")] if leads else []
    return L.Trainer(
        max_epochs=plan.schedule.num_epochs,
        precision="bf16-mixed" if plan.device.type == "cuda" else "32-true",
        logger=loggers if leads else False,
        log_every_n_steps=10,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        callbacks=[*callbacks, *progress],
        plugins=[cluster_environment(), StagedCheckpoints()],
        **_placement(plan),
    )


def clear_unfinished(out: Path) -> None:
    """Remove the files of an unfinished run that has no checkpoint to resume from."""
    if not any(work_folder(out).glob(LAST)):
        shutil.rmtree(work_folder(out), ignore_errors=True)


def _placement(plan: TrainingPlan) -> dict[str, Any]:
    """Trainer arguments: one device, or all processes on shares of the same batches."""
    device, context = plan.device, plan.context
    on_gpu = device.type == "cuda"
    accelerator = "gpu" if on_gpu else "cpu"
    if context.size > 1 and plan.data_parallel:
        here = int_from_environment("LOCAL_WORLD_SIZE", context.size, least=1)
        group = None
        if on_gpu:  # gradients go over NCCL; the default group, for barriers, is gloo
            torch.cuda.set_device(device)
            group = torch.distributed.new_group(backend="nccl")
        return {
            "accelerator": accelerator,
            "strategy": DDPStrategy(process_group=group),
            "devices": here,
            "num_nodes": context.size // here,
        }
    if on_gpu:
        return {"accelerator": accelerator, "devices": [device.index or 0]}
    return {"strategy": SingleDeviceStrategy(device, accelerator=CPUAccelerator())}


def check_unfinished(work: Path, options: dict[str, Any]) -> bool:
    """Whether there is a run to resume.

    Raises:
        InputError: It was started with other options, by another number of processes that share
            batches, or by an earlier sparsecast whose checkpoints lack what these have.
    """
    if not any(work.glob(LAST)):
        return False
    earlier = read_json(work / RECIPE, "the options of an unfinished `sparsecast train`")
    now, shared = options.get("processes"), options.get("data_parallel")
    was = earlier.get("processes", now)
    if was != now and earlier.get("data_parallel") == shared:
        held = f"{work}: holds an unfinished run of {was} processes"
        if shared:
            raise InputError(
                f"{held} that share its batches, and {now} would make other batches; repeat it "
                f"with torchrun --nproc-per-node {was}, or remove that folder"
            )
        raise _of_an_earlier_version(held)
    # Before there was --loss, the weights of quantized predictors were kept without the mean input.
    quantized = earlier.get("recipe") == "default" and earlier.get("predictor_dtype") != "f16"
    if quantized and "loss" not in earlier:
        raise _of_an_earlier_version(f"{work}: holds an unfinished run")
    changes = compare_options(earlier, json.loads(json.dumps(options)))
    check_unchanged(work, "an unfinished run", changes, finished=False)
    return True


def _of_an_earlier_version(held: str) -> InputError:
    return InputError(
        f"{held} of an earlier sparsecast; finish it with that version, or remove that folder"
    )


def ranks_of_unfinished(work: Path, layers: int) -> list[int] | None:
    """The ranks that an unfinished run has chosen; None if there is none, or one that did not say.

    Raises:
        InputError: They are not one positive number for each layer.
    """
    if not any(work.glob(LAST)):
        return None
    kept = read_json(work / RECIPE, "the options of an unfinished `sparsecast train`")
    ranks = kept.get("ranks")
    if ranks is None:
        return None
    if not (isinstance(ranks, list) and len(ranks) == layers and all(map(is_count, ranks))):
        raise InputError(
            f"{work / RECIPE}: damaged, its ranks are not one number for each of {layers} layers; "
            "remove that folder"
        )
    return ranks


def begin(plan: TrainingPlan) -> None:
    """Make the folder of a new run, or take up an interrupted one; every process calls this.

    Raises:
        InputError: An unfinished run with other options, a damaged checkpoint, or a folder that not
            every process sees.
    """
    with plan.context.together():
        if plan.context.leads:
            _open_work_folder(plan)
    check_shared(plan.work, plan.context)
    if not plan.shape.experts:
        with plan.context.together():
            regroup(plan)
        with plan.context.together():
            if plan.context.leads:
                remove_divided(plan)


def _open_work_folder(plan: TrainingPlan) -> None:
    work, options = plan.work, plan.resume_options
    begun = check_unfinished(work, options)
    for leftover in (*work.glob("*.part"), *work.glob("layer-*.pt")):
        leftover.unlink()
    if begun:
        log.info("resuming from the last finished epoch")
        return
    work.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(work / LOGS, ignore_errors=True)
    write_json(work / RECIPE, {**options, "ranks": plan.ranks})


def finish_logs(work: Path, folder: Path) -> None:
    """Move the logs of a finished run into its folder, and remove its other files."""
    if (work / LOGS).is_dir():
        shutil.move(work / LOGS, folder / LOGS)
    shutil.rmtree(work, ignore_errors=True)
