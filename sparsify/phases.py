"""The phases of a run, each finished once and kept until the whole run is.

Pre-training and every branch leave `<name>.pt` in the work folder; the phase under way leaves
`<name>.ckpt` every `CHECKPOINT_STEPS` steps and at an interrupt.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from torch import nn
from torch.utils.data import DataLoader

from sparsecast.collect.families import family_of
from sparsecast.collect.launcher import launcher
from sparsecast.collect.progress import console
from sparsecast.sparsify.config import SparsifyConfig
from sparsecast.sparsify.measure import Score, score
from sparsecast.sparsify.module import Phase, SparsifyModule
from sparsecast.sparsify.start import Start
from sparsecast.sparsify.text import Batches

CHECKPOINT_STEPS = 500
DECAY_SHARE = 0.5
"""Of the sparse training, over which the learning rate falls."""


def train_all(cfg: SparsifyConfig, start: Start, work: Path) -> dict[str, Score]:
    """Run every phase; leaves the ProSparse weights, before the shift, in `start.model`."""
    model, optimizer = start.model, None
    if start.pretrain_steps:
        phase = _phase(start, "pre-training", 0, start.pretrain_steps)
        optimizer = _fit(cfg, start, phase, work, optimizer)
    trunk = {name: value.clone() for name, value in model.state_dict().items()}
    branches: list[tuple[str, nn.Module, float]] = []
    if cfg.baselines:
        branches = [("SiLU original", nn.SiLU(), 0.0), ("plain ReLU", nn.ReLU(), 0.0)]
    branches.append(("ProSparse before the shift", nn.ReLU(), start.l1))
    family = family_of(model.config, "model")
    parent, _, attribute = family.act.rpartition(".")
    scores = {}
    for name, activation, l1 in branches:
        model.load_state_dict(trunk)
        for layer in family.decoder_layers(model):
            setattr(layer.get_submodule(parent), attribute, activation)
        phase = _phase(start, name, start.pretrain_steps, start.steps, l1)
        _fit(cfg, start, phase, work, optimizer)
        result = scores[name] = score(model, start.held_out)
        console.print(f"{name}: perplexity {result.perplexity:.3f}, sparsity {result.sparsity:.2%}")
    return scores


def _phase(start: Start, name: str, first: int, stop: int, l1: float = 0.0) -> Phase:
    return Phase(
        name=name,
        start=first,
        stop=stop,
        l1=l1,
        lr=start.lr,
        warmup=min(500, start.steps // 20 + 1),
        decay_from=start.steps - int(DECAY_SHARE * (start.steps - start.pretrain_steps)),
    )


def _fit(
    cfg: SparsifyConfig, start: Start, phase: Phase, work: Path, optimizer: dict[str, Any] | None
) -> dict[str, Any]:
    """Train one phase, or load it if it was finished before; returns the optimiser's state."""
    slug = phase.name.replace(" ", "-")
    done, last = work / f"{slug}.pt", work / f"{slug}.ckpt"
    if done.is_file():
        saved = torch.load(done, map_location=start.device, weights_only=True)
        start.model.load_state_dict(saved["model"])
        finished: dict[str, Any] = saved["optimizer"]
        return finished
    step = 0
    if last.is_file():
        step = torch.load(last, map_location="cpu", weights_only=True)["global_step"]
        console.print(f"{phase.name}: resuming at step {step:,}")
    else:
        console.print(f"{phase.name}: {phase.stop - phase.start:,} steps")
    on_gpu = start.device.type == "cuda"
    batch_size = cfg.batch_tokens // cfg.seq_len
    data = Batches(start.rows_NS, batch_size, cfg.seed, phase.start + step)
    trainer = _trainer(phase, work, slug, on_gpu)
    module = SparsifyModule(start.model, phase, optimizer, compile=on_gpu and cfg.compile)
    try:
        trainer.fit(
            module,
            DataLoader(data, batch_size=None),
            ckpt_path=str(last) if step else None,
            weights_only=True,
        )
    except SystemExit as stop:  # how Lightning ends at an interrupt
        raise KeyboardInterrupt from stop
    finally:
        module.remove_hooks()
    start.model.to(start.device)
    state = trainer.optimizers[0].state_dict()
    part = done.with_suffix(".part")
    torch.save({"model": start.model.state_dict(), "optimizer": state}, part)
    part.replace(done)
    last.unlink(missing_ok=True)
    return state


def _trainer(phase: Phase, work: Path, slug: str, on_gpu: bool) -> L.Trainer:
    checkpoint = ModelCheckpoint(
        dirpath=work,
        filename=slug,
        every_n_train_steps=CHECKPOINT_STEPS,
        save_top_k=1,
        enable_version_counter=False,
    )
    return L.Trainer(
        max_steps=phase.stop - phase.start,
        accelerator="gpu" if on_gpu else "cpu",
        devices=1,
        precision="bf16-mixed" if on_gpu else "32-true",
        logger=False,
        enable_model_summary=False,
        callbacks=[RichProgressBar(refresh_rate=10), checkpoint],
        plugins=[launcher()],
    )
