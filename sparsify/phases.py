"""Train the phases of a run: pre-training, the baselines, ProSparse.

A finished phase leaves `<name>.pt` in the work folder. The current phase writes `<name>.ckpt` every
`CHECKPOINT_STEPS` steps and on an interrupt.
"""

from __future__ import annotations

from math import isfinite
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader

from sparsecast.core.interrupts import StopFlag, interrupt_like, stop_on_signal
from sparsecast.core.lightning import (
    StagedCheckpoints,
    TrainingBar,
    cluster_environment,
    quiet_lightning,
)
from sparsecast.core.messages import log
from sparsecast.core.models.families import family_of
from sparsecast.core.torch_files import save_torch
from sparsecast.sparsify.lightning_module import Phase, SparsifyModule
from sparsecast.sparsify.measure import Score, score
from sparsecast.sparsify.plan import SparsifyPlan
from sparsecast.sparsify.prepare import TrainingSetup
from sparsecast.sparsify.sequences import Batches
from sparsecast.sparsify.work_folder import Diverged, WorkFolder

CHECKPOINT_STEPS = 500
LOSS_CHECK_STEPS = 50
"""Steps between two checks of the loss; each check waits for the device."""
DECAY_SHARE = 0.5
"""Last part of the sparse training, in which the learning rate falls."""
NAMES = {"silu": "SiLU", "gelu": "GELU", "relu": "ReLU", "fatrelu": "FATReLU", "drelu": "dReLU"}


def train_all(plan: SparsifyPlan, setup: TrainingSetup, work: WorkFolder) -> dict[str, Score]:
    """Train every phase and score each branch on held-out text.

    `setup.model` ends with the weights of ProSparse before the threshold shift.

    Raises:
        Diverged: Training has destroyed the model.
    """
    model, optimizer = setup.model, None
    log.info(f"{plan.steps:,} steps of {plan.batch_size * plan.seq_len:,} tokens")
    if plan.pretrain_steps:
        phase = _phase(plan, "pre-training", 0, plan.pretrain_steps)
        optimizer = _train(plan, setup, phase, work, optimizer)
    trunk = {name: value.clone() for name, value in model.state_dict().items()}
    family = family_of(model.config, "model")
    parent, _, attribute = family.act.rpartition(".")
    scores = {}
    for name, activation, l1 in _branches(plan, setup):
        model.load_state_dict(trunk)
        for layer in family.decoder_layers(model):
            setattr(layer.get_submodule(parent), attribute, activation)
        phase = _phase(plan, name, plan.pretrain_steps, plan.steps, l1)
        _train(plan, setup, phase, work, optimizer)
        result = scores[name] = score(model, setup.held_out)
        _check_score(result, phase, plan.l1)
        log.info(f"{name}: perplexity {result.perplexity:.3f}, sparsity {result.sparsity:.2%}")
    return scores


def _branches(plan: SparsifyPlan, setup: TrainingSetup) -> list[tuple[str, nn.Module, float]]:
    """List (name, activation, final L1 weight) of the branches that share the same start."""
    family = family_of(setup.model.config, "model")
    found = [("ProSparse before the shift", setup.rule.module(), plan.l1)]
    if not plan.baselines:
        return found
    act = str(getattr(setup.model.config, family.act_key))
    original = family.decoder_layers(setup.model)[0].get_submodule(family.act)
    if act != setup.rule.name:
        found.insert(0, (f"plain {NAMES[setup.rule.name]}", setup.rule.module(), 0.0))
    return [(f"{NAMES.get(act, act)} original", original, 0.0), *found]


def _check_score(result: Score, phase: Phase, l1: float) -> None:
    if not isfinite(result.perplexity):
        raise Diverged(
            f"--lr {phase.lr:g}: training diverged, {phase.name} has a held-out perplexity of "
            f"{result.perplexity}; choose a smaller --lr"
        )
    if result.sparsity == 1:
        raise Diverged(
            f"--l1 {l1:g}: no neuron of {phase.name} fires any more on held-out text; choose "
            "a smaller --l1 or --lr"
        )


def _phase(plan: SparsifyPlan, name: str, first: int, stop: int, l1: float = 0.0) -> Phase:
    return Phase(
        name=name,
        start=first,
        stop=stop,
        l1=l1,
        lr=plan.lr,
        warmup=min(500, plan.steps // 20 + 1),
        decay_from=plan.steps - int(DECAY_SHARE * (plan.steps - plan.pretrain_steps)),
    )


def _train(
    plan: SparsifyPlan,
    setup: TrainingSetup,
    phase: Phase,
    work: WorkFolder,
    optimizer: dict[str, Any] | None,
) -> dict[str, Any]:
    """Train one phase or load its finished weights; return the state of the optimizer."""
    slug = phase.name.replace(" ", "-")
    done, last = work.path / f"{slug}.pt", work.path / f"{slug}.ckpt"
    if done.is_file():
        saved = torch.load(done, map_location=plan.device, weights_only=True)
        setup.model.load_state_dict(saved["model"])
        finished: dict[str, Any] = saved["optimizer"]
        return finished
    step = 0
    if last.is_file():
        step = torch.load(last, map_location="cpu", weights_only=True)["global_step"]
        log.info(f"{phase.name}: resuming at step {step:,}")
    else:
        log.info(f"{phase.name}: {phase.stop - phase.start:,} steps")
    data = Batches(setup.rows_NS, plan.batch_size, plan.seed, phase.start + step)
    module = SparsifyModule(setup.model, phase, optimizer, compile=plan.compile)
    try:
        with stop_on_signal() as stop, quiet_lightning():
            trainer = _trainer(phase, _Checkpoints(last, phase, stop), plan.device)
            trainer.fit(
                module,
                DataLoader(data, batch_size=None),
                ckpt_path=str(last) if step else None,
                weights_only=True,
            )
    except SystemExit as ended:  # Lightning turns an interrupt into this
        raise interrupt_like(ended) from ended
    finally:
        module.remove_hooks()
    setup.model.to(plan.device)
    state = trainer.optimizers[0].state_dict()
    save_torch({"model": setup.model.state_dict(), "optimizer": state}, done)
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
                    f"--lr {self._phase.lr:g}: training diverged in {self._phase.name} by step "
                    f"{step:,}, the loss is {loss:g}; choose a smaller --lr"
                    + (f" or an --l1 below {self._phase.l1:g}" if self._phase.l1 else "")
                )
        if due and step < end:
            trainer.save_checkpoint(self._last)
        self._stop.check()


def _trainer(phase: Phase, checkpoints: _Checkpoints, device: torch.device) -> L.Trainer:
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
        callbacks=[TrainingBar(phase.name), checkpoints],
        plugins=[cluster_environment(), StagedCheckpoints()],
    )
