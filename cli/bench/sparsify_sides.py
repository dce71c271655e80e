"""What `bench sparsify` times: bare Lightning, and the modules that `sparsify` trains with."""

from __future__ import annotations

import copy
import gc
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sparsecast.cli.bench.rounds import synchronize
from sparsecast.core.lightning import quiet_lightning
from sparsecast.core.models.loading import set_activation
from sparsecast.core.models.pretrained import random_model
from sparsecast.sparsify.phases import put_activation
from sparsecast.sparsify.prepare import sparse_rule
from sparsecast.sparsify.sequences import Batches
from sparsecast.sparsify.training.lightning_module import Phase, SparsifyModule
from sparsecast.sparsify.training.raised_threshold import RaisedFATReLU, RaisedThreshold

NAMES = {"bare": "bare Lightning", "l1": "ProSparse's L1 term", "target": "raised threshold"}
LR, L1, TARGET = 1e-4, 0.1, 0.85


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The shape, the batches and how they are trained."""

    config: Any
    rows: Path
    batch_size: int
    seq_len: int
    micro_batch: int | None
    checkpoint_activations: bool
    compile: bool
    warmup: int
    steps: int
    device: torch.device

    @property
    def all_steps(self) -> int:
        return self.warmup + self.steps


class Bare(L.LightningModule):
    """Causal language modeling with transformers' own loss."""

    def __init__(self, model: Any, compile: bool) -> None:
        super().__init__()
        self.model = model
        self._run = (torch.compile(model) if compile else model,)  # no second submodule

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        loss: Tensor = self._run[0](input_ids=batch, labels=batch, use_cache=False).loss
        return loss

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        nn.utils.clip_grad_norm_(self.parameters(), 1.0)

    def configure_optimizers(self) -> Any:
        fused = self.device.type == "cuda"
        return torch.optim.AdamW(self.parameters(), lr=LR, betas=(0.9, 0.95), fused=fused)


class Side:
    """One module, trained for some steps in every round; its compiled code is kept between."""

    def __init__(self, module: L.LightningModule, work: Workload) -> None:
        self._module, self._work = module, work
        self.parameters = sum(p.numel() for p in module.parameters())
        self.first_step = 0.0
        """Seconds of the very first step."""
        self.peak: int | None = None
        """Bytes on the GPU for this model alone, at most."""

    def seconds_per_step(self) -> float:
        """Train once; the mean over the timed steps."""
        work, clock = self._work, _Clock(self._work)
        gc.collect()
        before = self._begin()
        with quiet_lightning():
            trainer = L.Trainer(
                max_steps=work.all_steps,
                accelerator="gpu" if work.device.type == "cuda" else "cpu",
                devices=[work.device.index or 0] if work.device.type == "cuda" else 1,
                precision="bf16-mixed" if work.device.type == "cuda" else "32-true",
                logger=False,
                enable_checkpointing=False,
                enable_model_summary=False,
                enable_progress_bar=False,
                callbacks=[clock],
            )
            data = Batches(work.rows, work.seq_len, work.batch_size, seed=0)
            pin = work.device.type == "cuda"
            trainer.fit(self._module, DataLoader(data, batch_size=None, pin_memory=pin))
        if before is not None:
            self.peak = max(self.peak or 0, torch.cuda.max_memory_allocated() - before)
        self.first_step = self.first_step or clock.first
        return clock.seconds / work.steps

    def _begin(self) -> int | None:
        """Return the bytes that other models hold; Lightning moves this one back and forth."""
        if self._work.device.type != "cuda":
            return None
        self._module.to("cpu")
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self._module.to(self._work.device)
        return before


class _Clock(Callback):
    """Time the first step, and those behind the warm-up."""

    def __init__(self, work: Workload) -> None:
        self._work = work
        self.first = self.seconds = 0.0

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step in (0, self._work.warmup):
            self._start = self._now()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 1:
            self.first = self._now() - self._start
        if trainer.global_step == self._work.all_steps:
            self.seconds = self._now() - self._start

    def _now(self) -> float:
        synchronize(self._work.device)
        return time.perf_counter()


def make_side(name: str, work: Workload) -> Side:
    """Build the model and its module.

    Args:
        name: A key of `NAMES`.
    """
    model: Any = random_model(copy.deepcopy(work.config), work.device)
    if name == "bare":
        return Side(Bare(model, work.compile), work)
    set_activation(model, sparse_rule(work.config))
    raised = None
    if name == "target":
        raised = RaisedThreshold(TARGET, work.all_steps).to(work.device)
        put_activation(RaisedFATReLU(raised), model)
    phase = Phase(
        name=name,
        start=0,
        stop=work.all_steps,
        l1=L1 if name == "l1" else 0.0,
        lr=LR,
        warmup=1,
        decay_from=work.all_steps,
        stages=None,
    )
    module = SparsifyModule(
        model,
        phase,
        compile=work.compile and not work.checkpoint_activations,
        micro_batch=work.micro_batch,
        checkpoint_activations=work.checkpoint_activations,
        raised=raised,
    )
    return Side(module, work)
