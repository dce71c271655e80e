"""Run Lightning trainers under this package's rules: progress bar, launcher, files and messages."""

from __future__ import annotations

import logging
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback

from sparsecast.core.interrupts import StopFlag
from sparsecast.core.progress import Bar, progress_bar
from sparsecast.core.torch_files import save_torch

NOTE_STEPS = 10
"""Steps between two updates of the displayed loss; each update waits for the GPU."""
LOGGERS = ("lightning.pytorch", "lightning.fabric")


def cluster_environment() -> ClusterEnvironment:
    """Return torchrun's environment if torchrun started this process, else a single process.

    Pass it as `Trainer(plugins=[cluster_environment()])`. Lightning also detects SLURM, LSF and
    MPI. Their variables are set in every shell of an allocation, so Lightning would wait for
    tasks that were never started.
    """
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    alone = LightningEnvironment()
    alone.set_global_rank(0)  # Lightning's loggers have read a rank from SLURM_PROCID already
    return alone


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silence Lightning's notices about devices, tips and the end of a fit; errors still appear."""
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            with _quiet_threads():
                yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def _quiet_threads() -> Iterator[None]:
    """Keep TensorBoard's thread from printing an OSError that the next log call raises anyway."""
    before = threading.excepthook

    def tell(args: threading.ExceptHookArgs) -> None:
        if not isinstance(args.exc_value, OSError):
            before(args)

    threading.excepthook = tell
    try:
        yield
    finally:
        threading.excepthook = before


class StopBetweenSteps(Callback):
    """Leave SIGTERM to the `stop_on_signal` around the fit, and end behind the step it came in.

    An interrupt in the midst of a step may strike the finalizer of a generator, where it is lost.
    Lightning's own handler would broadcast, in the midst of what processes exchange.
    """

    def __init__(self, stop: StopFlag) -> None:
        self._stop = stop
        self._on_sigterm = signal.getsignal(signal.SIGTERM)

    def on_train_start(self, *_: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._on_sigterm)

    def on_train_batch_end(self, *_: Any) -> None:
        self._stop.check()

    def on_validation_batch_end(self, *_: Any) -> None:
        self._stop.check()


class StagedCheckpoints(TorchCheckpointIO):
    """Write checkpoints beside their final place: `Trainer(plugins=[StagedCheckpoints()])`.

    Lightning stages them in the system's temporary folder, which may be on another disk and too
    small.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        save_torch(checkpoint, Path(path))


class TrainingBar(Callback):
    """Show the optimizer steps and the values that the module logs with `prog_bar=True`."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._open = ExitStack()
        self._bar: Bar | None = None
        self._shown = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        total = int(trainer.estimated_stepping_batches)
        self._bar = self._open.enter_context(progress_bar(self._title, total))
        self._advance(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._advance(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._advance(trainer, last=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._open.close()

    def on_exception(self, *_: Any) -> None:
        self._open.close()

    def _advance(self, trainer: L.Trainer, *, last: bool = False) -> None:
        assert self._bar is not None
        step = trainer.global_step
        note = None
        if last or step % NOTE_STEPS == 0:
            values = trainer.progress_bar_metrics
            note = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        self._bar.advance(step - self._shown, note)
        self._shown = step
