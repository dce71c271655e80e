"""Record the curves of a phase while it trains: a CSV table, and TensorBoard's event files.

Sums stay on the device; it is waited for once per row. They go into the checkpoints, so a run that
goes on from one writes the rows of an uninterrupted run. TensorBoard drops what a killed run had
written beyond its checkpoint.

Shape letters: L layers, F FFN width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from sparsecast.core.models.families import family_of
from sparsecast.sparsify.training.curve_table import (
    TENSORBOARD,
    Row,
    append_row,
    begin_table,
    table_path,
)
from sparsecast.sparsify.training.lightning_module import Phase, SparsifyModule

ROWS = 200
"""Rows that a phase has at least, where it has so many steps."""
MOST_STEPS = 50
"""Most steps from one row to the next."""
STATE = "curves"
"""Key in a checkpoint."""


class Curves(Callback):
    """Write a row every few steps, and one behind the last step."""

    def __init__(self, folder: Path, phase: Phase, step_tokens: int) -> None:
        """`step_tokens`: tokens per optimizer step."""
        self._table = table_path(folder, phase.name)
        self._events = folder / TENSORBOARD / self._table.stem
        self._phase = phase
        self._step_tokens = step_tokens
        self._steps = phase.stop - phase.start
        self._every = max(1, min(MOST_STEPS, self._steps // ROWS))
        self._state: dict[str, Any] | None = None
        self._written = 0
        self._lr = 0.0
        self._writer: SummaryWriter | None = None
        self._open = ExitStack()

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._state = checkpoint.get(STATE)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        sums, fired_LF = self._reduced(trainer)
        checkpoint[STATE] = {"sums": sums, "batches": self._batches, "fired": fired_LF}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, SparsifyModule)
        family = family_of(pl_module.model.config, "model")
        layers = family.decoder_layers(pl_module.model)
        readers = [layer.get_submodule(family.x1_reader) for layer in layers]
        width = readers[0].get_parameter("weight").shape[-1]
        state = self._state or {
            "sums": torch.zeros(2 + len(readers)),
            "batches": 0,
            "fired": torch.zeros(len(readers), width, dtype=torch.bool),
        }
        self._sums = state["sums"].to(pl_module.device)
        self._fired_LF = state["fired"].to(pl_module.device)
        self._batches = state["batches"]
        for reader, fired_F in zip(readers, self._fired_LF, strict=True):
            handle = reader.register_forward_pre_hook(partial(_note_fired, fired_F))
            self._open.callback(handle.remove)
        self._written = trainer.global_step
        if trainer.is_global_zero:
            step = self._phase.start + trainer.global_step
            begin_table(self._table, len(readers), step)
            self._writer = SummaryWriter(self._events, purge_step=step + 1)
            self._open.callback(self._writer.close)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._open.close()

    def on_exception(self, *_: Any) -> None:
        self._open.close()

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any
    ) -> None:
        self._lr = optimizer.param_groups[0]["lr"]

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, SparsifyModule)
        self._sums += pl_module.measured
        self._batches += 1
        step = trainer.global_step
        if step > self._written and (step % self._every == 0 or step == self._steps):
            self._write(trainer, pl_module, step)

    def _write(self, trainer: L.Trainer, module: SparsifyModule, step: int) -> None:
        weight, raised = float(module.l1_weight), module.raised
        sums, fired_LF = self._reduced(trainer)
        dead_L = (~fired_LF).sum(1)
        goal_2 = sums.new_zeros(2) if raised is None else raised.goal
        values = torch.cat([goal_2, sums / self._batches, dead_L]).tolist()
        goal, (loss, l1, *rest) = values[:2], values[2:]
        layers = len(dead_L)
        self._sums.zero_()
        self._fired_LF.zero_()
        self._batches, self._written = 0, step
        if self._writer is None:
            return
        step += self._phase.start
        tokens = step * self._step_tokens
        sparsity_L, dead = rest[:layers], [int(count) for count in rest[layers:]]
        row = Row(step, tokens, loss, l1, weight, float(self._lr), sparsity_L, dead, *goal)
        append_row(self._table, row)
        for tag, value in _scalars(row):
            self._writer.add_scalar(tag, value, step)
        self._writer.flush()

    def _reduced(self, trainer: L.Trainer) -> tuple[Tensor, Tensor]:
        """Return the sums and the neurons that fired, of all processes."""
        reduce: Any = trainer.strategy.reduce
        fired_LF = reduce(self._fired_LF.float(), reduce_op="sum") > 0
        return reduce(self._sums.clone(), reduce_op="mean"), fired_LF


def _note_fired(fired_F: Tensor, _: nn.Module, args: tuple[Tensor, ...]) -> None:
    if torch.is_grad_enabled():  # else text is measured that is not trained on
        fired_F |= (args[0].detach() != 0).flatten(0, -2).any(0)


def _scalars(row: Row) -> Iterator[tuple[str, float]]:
    yield from {
        "loss": row.loss,
        "l1": row.l1,
        "lambda": row.weight,
        "lr": row.lr,
        "threshold": row.threshold,
        "wanted sparsity": row.wanted,
        "sparsity": row.sparsity,
    }.items()
    for layer, (sparsity, dead) in enumerate(zip(row.sparsity_L, row.dead_L, strict=True)):
        yield f"sparsity_of_layers/{layer}", sparsity
        yield f"dead_neurons/{layer}", dead
