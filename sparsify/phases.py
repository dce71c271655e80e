"""The phases of a run, each finished once and kept until the whole run is.

Pre-training and every branch leave `<name>.pt` in the work folder; the phase under way leaves
`<name>.ckpt` every `CHECKPOINT_STEPS` steps, and when somebody wants it to end.
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
from sparsecast.sparsify.config import SparsifyConfig
from sparsecast.sparsify.lightning_module import Phase, SparsifyModule
from sparsecast.sparsify.measure import Score, score
from sparsecast.sparsify.sequences import Batches
from sparsecast.sparsify.start import Start
from sparsecast.sparsify.work_folder import Diverged, Work

CHECKPOINT_STEPS = 500
LOOK_STEPS = 50
"""Between two looks at the loss, which wait for the device."""
DECAY_SHARE = 0.5
"""Of the sparse training, over which the learning rate falls."""
NAMES = {"silu": "SiLU", "gelu": "GELU", "relu": "ReLU", "fatrelu": "FATReLU", "drelu": "dReLU"}


def train_all(cfg: SparsifyConfig, start: Start, work: Work) -> dict[str, Score]:
    """Run every phase; leaves the ProSparse weights, before the shift, in `start.model`.

    Raises:
        Diverged: Training has destroyed the model.
    """
    model, optimizer = start.model, None
    log.info(f"{cfg.steps:,} steps of {cfg.step_tokens:,} tokens")
    if cfg.pretrain_steps:
        phase = _phase(cfg, "pre-training", 0, cfg.pretrain_steps)
        optimizer = _fit(cfg, start, phase, work, optimizer)
    trunk = {name: value.clone() for name, value in model.state_dict().items()}
    family = family_of(model.config, "model")
    parent, _, attribute = family.act.rpartition(".")
    scores = {}
    for name, activation, l1 in _branches(cfg, start):
        model.load_state_dict(trunk)
        for layer in family.decoder_layers(model):
            setattr(layer.get_submodule(parent), attribute, activation)
        phase = _phase(cfg, name, cfg.pretrain_steps, cfg.steps, l1)
        _fit(cfg, start, phase, work, optimizer)
        result = scores[name] = score(model, start.held_out)
        _check(cfg, result, name)
        log.info(f"{name}: perplexity {result.perplexity:.3f}, sparsity {result.sparsity:.2%}")
    return scores


def _branches(cfg: SparsifyConfig, start: Start) -> list[tuple[str, nn.Module, float]]:
    """(name, activation, last lambda) of what goes on from the same weights."""
    family = family_of(start.model.config, "model")
    found = [("ProSparse before the shift", start.rule.module(), cfg.last_l1)]
    if not cfg.baselines:
        return found
    act = str(getattr(start.model.config, family.act_key))
    original = family.decoder_layers(start.model)[0].get_submodule(family.act)
    if act != start.rule.name:
        found.insert(0, (f"plain {NAMES[start.rule.name]}", start.rule.module(), 0.0))
    return [(f"{NAMES.get(act, act)} original", original, 0.0), *found]


def _check(cfg: SparsifyConfig, result: Score, name: str) -> None:
    if not isfinite(result.perplexity):
        raise Diverged(
            f"--lr {cfg.peak_lr:g}: training diverged, {name} has a held-out perplexity of "
            f"{result.perplexity}; choose a smaller --lr"
        )
    if result.sparsity == 1:
        raise Diverged(
            f"--l1 {cfg.last_l1:g}: no neuron of {name} fires any more on held-out text; choose "
            "a smaller --l1 or --lr"
        )


def _phase(cfg: SparsifyConfig, name: str, first: int, stop: int, l1: float = 0.0) -> Phase:
    return Phase(
        name=name,
        start=first,
        stop=stop,
        l1=l1,
        lr=cfg.peak_lr,
        warmup=min(500, cfg.steps // 20 + 1),
        decay_from=cfg.steps - int(DECAY_SHARE * (cfg.steps - cfg.pretrain_steps)),
    )


def _fit(
    cfg: SparsifyConfig, start: Start, phase: Phase, work: Work, optimizer: dict[str, Any] | None
) -> dict[str, Any]:
    """Train one phase, or load it if it was finished before; returns the optimiser's state."""
    slug = phase.name.replace(" ", "-")
    done, last = work.path / f"{slug}.pt", work.path / f"{slug}.ckpt"
    if done.is_file():
        saved = torch.load(done, map_location=start.device, weights_only=True)
        start.model.load_state_dict(saved["model"])
        finished: dict[str, Any] = saved["optimizer"]
        return finished
    step = 0
    if last.is_file():
        step = torch.load(last, map_location="cpu", weights_only=True)["global_step"]
        log.info(f"{phase.name}: resuming at step {step:,}")
    else:
        log.info(f"{phase.name}: {phase.stop - phase.start:,} steps")
    on_gpu = start.device.type == "cuda"
    data = Batches(start.rows_NS, cfg.batch_size, cfg.seed, phase.start + step)
    module = SparsifyModule(start.model, phase, optimizer, compile=on_gpu and cfg.compile)
    try:
        with stop_on_signal() as stop, quiet_lightning():
            trainer = _trainer(phase, _Keep(last, phase, stop), start.device)
            trainer.fit(
                module,
                DataLoader(data, batch_size=None),
                ckpt_path=str(last) if step else None,
                weights_only=True,
            )
    except SystemExit as ended:  # how Lightning ends at an interrupt
        raise interrupt_like(ended) from ended
    finally:
        module.remove_hooks()
    start.model.to(start.device)
    state = trainer.optimizers[0].state_dict()
    save_torch({"model": start.model.state_dict(), "optimizer": state}, done)
    last.unlink(missing_ok=True)
    return state


class _Keep(Callback):
    """Put checkpoints in place, whole, and none of a model that has diverged."""

    def __init__(self, last: Path, phase: Phase, stop: StopFlag) -> None:
        self._last = last
        self._phase = phase
        self._stop = stop

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any
    ) -> None:
        step, end = trainer.global_step, self._phase.stop - self._phase.start
        due = step % CHECKPOINT_STEPS == 0 or self._stop.asked
        if step % LOOK_STEPS == 0 or due or step == end:
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


def _trainer(phase: Phase, keep: _Keep, device: torch.device) -> L.Trainer:
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
        callbacks=[TrainingBar(phase.name), keep],
        plugins=[cluster_environment(), StagedCheckpoints()],
    )
