"""The progress bar as a callback of Lightning's trainers."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from sparsecast.core.progress import Bar, progress_bar

NOTE_STEPS = 10
"""Between two looks at the loss, for which a GPU has to be waited for."""


class TrainingBar(Callback):
    """Steps of a training, and what the module logs for the bar."""

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
