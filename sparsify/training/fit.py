"""Train one phase of a run, with checkpoints that a killed run goes on from."""

from __future__ import annotations

from math import isfinite
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from sparsecast.core.interrupts import StopFlag, interrupt_like, stop_on_signal
from sparsecast.core.lightning import (
    StagedCheckpoints,
    TrainingBar,
    cluster_environment,
    quiet_lightning,
)
from sparsecast.core.messages import log
from sparsecast.core.torch_files import save_torch
from sparsecast.sparsify.chats import AnswerBatches
from sparsecast.sparsify.plan import SparsifyPlan
from sparsecast.sparsify.prepare import TrainingSetup
from sparsecast.sparsify.sequences import Batches
from sparsecast.sparsify.training.curve_table import CURVES
from sparsecast.sparsify.training.curves import Curves
from sparsecast.sparsify.training.lightning_module import Phase, SparsifyModule
from sparsecast.sparsify.training.raised_threshold import RaisedThreshold
from sparsecast.sparsify.work_folder import Diverged, WorkFolder

CHECKPOINT_STEPS = 500
LOSS_CHECK_STEPS = 50
"""Steps between two checks of the loss; each check waits for the device."""


def train_phase(
    plan: SparsifyPlan,
    setup: TrainingSetup,
    phase: Phase,
    work: WorkFolder,
    optimizer: dict[str, Any] | None,
    raised: RaisedThreshold | None = None,
    guard: Callback | None = None,
) -> dict[str, Any]:
    """Train one phase or load its finished weights; return the state of the optimizer.

    Args:
        optimizer: State of the phase before.
        raised: The threshold of the model's activations, which training moves.
        guard: Stops its rise.
    """
    slug = phase.name.replace(" ", "-")
    done, last = work.path / f"{slug}.pt", work.path / f"{slug}.ckpt"
    if done.is_file():
        saved = torch.load(done, map_location=plan.device, weights_only=True)
        setup.model.load_state_dict(saved["model"])
        if raised is not None:
            raised.load_state_dict(saved["raised"])
        earlier: dict[str, Any] = saved["optimizer"]
        return earlier
    step = 0
    if last.is_file():
        step = torch.load(last, map_location="cpu", weights_only=True)["global_step"]
        log.info(f"{phase.name}: resuming at step {step:,}")
    else:
        log.info(f"{phase.name}: {phase.stop - phase.start:,} steps")
    first = phase.start + step
    data: Batches | AnswerBatches = Batches(setup.rows_NS, plan.batch_size, plan.seed, first)
    if phase.answers:
        assert setup.chats is not None
        data = AnswerBatches(setup.chats.train_N2S, plan.batch_size, plan.seed, first)
    module = SparsifyModule(setup.model, phase, optimizer, compile=plan.compile, raised=raised)
    try:
        with stop_on_signal() as stop, quiet_lightning():
            curves = Curves(work.path / CURVES, phase, plan.batch_size * plan.seq_len)
            callbacks = [curves, *([guard] if guard else []), _Checkpoints(last, phase, stop)]
            trainer = _trainer(phase, callbacks, plan.device)
            trainer.fit(
                module,
                DataLoader(data, batch_size=None, pin_memory=plan.device.type == "cuda"),
                ckpt_path=str(last) if step else None,
                weights_only=True,
            )
    except SystemExit as ended:  # Lightning turns an interrupt into this
        raise interrupt_like(ended) from ended
    finally:
        module.remove_hooks()
    setup.model.to(plan.device)
    state = trainer.optimizers[0].state_dict()
    finished = {"model": setup.model.state_dict(), "optimizer": state}
    if raised is not None:
        raised.to(plan.device)
        finished["raised"] = raised.state_dict()
    save_torch(finished, done)
    last.unlink(missing_ok=True)
    return state


class _Checkpoints(Callback):
    """Write checkpoints atomically, and raise `Diverged` before writing a broken one."""

    def __init__(self, last: Path, phase: Phase, stop: StopFlag) -> None:
        self._last = last
        self._phase = phase
        self._stop = stop

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any
    ) -> None:
        step, end = trainer.global_step, self._phase.stop - self._phase.start
        due = step % CHECKPOINT_STEPS == 0 or self._stop.asked
        if step % LOSS_CHECK_STEPS == 0 or due or step == end:
            loss = float(outputs["loss"])
            whole = not (due or step == end) or all(
                bool(weight.isfinite().all()) for weight in pl_module.parameters()
            )
            if not isfinite(loss) or not whole:
                raise Diverged(
                    f"{self._phase.lr_option} {self._phase.lr:g}: training diverged in "
                    f"{self._phase.name} by step {step:,}, the loss is {loss:g}; choose a smaller "
                    + self._phase.lr_option
                    + (f" or an --l1 below {self._phase.l1:g}" if self._phase.l1 else "")
                )
        if due and step < end:
            trainer.save_checkpoint(self._last)
        self._stop.check()


def _trainer(phase: Phase, callbacks: list[Callback], device: torch.device) -> L.Trainer:
    on_gpu = device.type == "cuda"
    return L.Trainer(
        max_steps=phase.stop - phase.start,
        accelerator="gpu" if on_gpu else "cpu",
        devices=[device.index or 0] if on_gpu else 1,
        precision="bf16-mixed" if on_gpu else "32-true",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=[TrainingBar(phase.name), *callbacks],
        plugins=[cluster_environment(), StagedCheckpoints()],
    )
