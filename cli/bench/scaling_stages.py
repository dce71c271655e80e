"""What every process of `sparsecast bench scaling` does: its share of the work of one stage.

    collect    whole batches of random ids through the model, recorded, finished as shards and
               dropped; a batch is a shard, and process r of N takes every N-th as `collect` does
    train      the default recipe's steps of every N-th layer, on a batch that is on the device
    sparsify   steps of the raised threshold as `sparsify` trains them: in one process the whole
               model, in several FSDP2's shares; each takes its part of every step's sequences

Weights are random, in the shape's sizes, and made on the process's own device.

Shape letters: L layers of this process, B tokens, D hidden, F FFN width, P packed width, N batches,
S sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from time import perf_counter
from typing import Any

import lightning as L
import numpy as np
import torch
from accelerate import init_empty_weights
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader
from transformers import LlamaConfig

from sparsecast.cli.bench.collect_runs import submitting
from sparsecast.cli.bench.rounds import synchronize, timed
from sparsecast.cli.bench.scaling_work import WARMUP, Job, Sizes, Timed
from sparsecast.cli.bench.sparsify_sides import LR, TARGET
from sparsecast.cli.bench.train_runs import random_start, training
from sparsecast.cli.bench.train_store import ACTIVE
from sparsecast.collect.store.shard import Shape
from sparsecast.collect.store.units import Unit
from sparsecast.collect.store.writer import Writer, to_memory
from sparsecast.core.bitmask import pack
from sparsecast.core.interrupts import StopFlag
from sparsecast.core.lightning import StopBetweenSteps, quiet_lightning
from sparsecast.core.models.loading import pick_dtype
from sparsecast.core.models.pretrained import random_model
from sparsecast.core.text.tokens import TokenBatch
from sparsecast.predictors.training.data import LayersBatch
from sparsecast.predictors.training.layer_parallel import layers_of_process
from sparsecast.sparsify.phases import put_activation
from sparsecast.sparsify.sequences import Batches, rows_file
from sparsecast.sparsify.training.fit import phase_trainer
from sparsecast.sparsify.training.lightning_module import Phase, SparsifyModule
from sparsecast.sparsify.training.raised_threshold import RaisedFATReLU, RaisedThreshold
from sparsecast.sparsify.training.sharding import ShardedModule, local


def collect(job: Job) -> Timed:
    """Record this process's batches. Memory: a copy of the model, and 3 shards on the host.

    A round takes over shards that the one before has left to the writer, and leaves as many.
    """
    size, model_size = job.sizes, job.sizes.model
    on_gpu = job.device.type == "cuda"
    dtype = pick_dtype("auto", None, job.device)
    model = random_model(_config(size, "relu"), job.device, dtype).eval()
    shape = Shape(
        layers=range(model_size.layers),
        hidden_size=model_size.hidden,
        ffn_width=model_size.ffn,
        x_dtype="bfloat16" if on_gpu else "float16",
    )
    ids_NBS = torch.randint(model_size.vocab, (job.steps, size.batch_size, size.seq_len))
    units = [
        Unit("train", number, [TokenBatch("train", ids_BS, torch.ones_like(ids_BS).bool())])
        for number, ids_BS in enumerate(ids_NBS)
    ]
    mine = units[job.context.rank :: job.context.size]
    capacity = shape.nbytes(units[0].tokens)
    with Writer(shape, capacity, to_memory, pinned=on_gpu) as writer, torch.inference_mode():
        seconds = _rounds(job, partial(submitting, model, shape, mine, writer))
    return Timed(seconds, ids_NBS.numel())


def train(job: Job) -> Timed:
    """Train this process's layers on one batch, again and again. Memory: as `train`."""
    size, shape = job.sizes, job.sizes.model
    own = len(layers_of_process(range(shape.layers), job.context, False))
    tokens, device = size.train_tokens, job.device
    x_LBD = torch.randn(own, tokens, shape.hidden, device=device, dtype=torch.bfloat16)
    mask_LBP = torch.stack(
        [pack(torch.rand(tokens, shape.ffn, device=device) < ACTIVE) for _ in range(own)]
    )
    start = random_start(shape.hidden, shape.ffn, own, size.rank, device)
    run = training(start, [LayersBatch(x_LBD, mask_LBP)], tokens, device)
    return Timed(_rounds(job, partial(run, job.steps)), job.steps * tokens * shape.layers)


def sparsify(job: Job) -> Timed:
    """Take training steps with the others.

    Memory: as a phase of `sparsify`; of several processes none has the whole model.
    """
    size, context = job.sizes, job.context
    last, seq_len = WARMUP + job.rounds * job.steps, 4 * size.seq_len
    raised = RaisedThreshold(TARGET, last).to(job.device)
    with init_empty_weights() if context.size > 1 else nullcontext():
        where = torch.device("cpu") if context.size > 1 else job.device
        model: Any = random_model(_config(size, "silu"), where)
    put_activation(RaisedFATReLU(raised), model)
    phase = Phase(
        name="scaling", start=0, stop=last, l1=0.0, lr=LR, warmup=1, decay_from=last, stages=None
    )
    options: dict[str, Any] = {
        "micro_batch": size.micro_batch,
        "checkpoint_activations": size.micro_batch is not None,
        "raised": raised,
    }
    module: SparsifyModule = (
        _RandomShares(model, phase, context=context, source=None, **options)
        if context.size > 1
        else SparsifyModule(model, phase, **options)
    )
    path = rows_file(job.folder, size.model.vocab)
    ids = np.random.default_rng(0).integers(
        size.model.vocab, size=2 * size.step_sequences * seq_len, dtype=path.suffix[1:]
    )
    ids.tofile(path)
    data = Batches(path, seq_len, size.step_sequences, seed=0)
    data.take_part(context.rank, context.size)
    clock = _Clock(job)
    with quiet_lightning():
        # Its default action, as without Lightning: nothing here is worth a checkpoint.
        ends = StopBetweenSteps(StopFlag())
        trainer = phase_trainer(phase, [ends, clock], context, job.device)
        # It would copy weights and moments to the host, 12 bytes a parameter.
        trainer.strategy.teardown = lambda: None  # type: ignore[method-assign]
        trainer.fit(module, DataLoader(data, batch_size=None))
    between = zip(clock.times, clock.times[1:], strict=False)
    return Timed([end - begin for begin, end in between], job.steps * size.step_sequences * seq_len)


STAGES = {"collect": collect, "train": train, "sparsify": sparsify}


class _RandomShares(ShardedModule):
    """A sharded model of which no process has had the whole: every share is random."""

    def configure_model(self) -> None:
        super().configure_model()
        for weight in self.model.parameters():
            share = local(weight.detach())
            if weight.dim() > 1:
                share.normal_(std=self.model.config.initializer_range)
            else:
                share.fill_(1)


class _Clock(Callback):
    """Note the time behind the warm-up and behind every round."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.times: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step >= WARMUP and (trainer.global_step - WARMUP) % self._job.steps == 0:
            synchronize(self._job.device)
            self.times.append(perf_counter())


def _config(size: Sizes, activation: str) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=size.model.hidden,
        intermediate_size=size.model.ffn,
        num_hidden_layers=size.model.layers,
        num_attention_heads=size.model.heads,
        num_key_value_heads=size.model.kv_heads,
        vocab_size=size.model.vocab,
        hidden_act=activation,
        max_position_embeddings=4 * size.seq_len,
        tie_word_embeddings=False,
    )


def _rounds(job: Job, run: Callable[[], object]) -> list[float]:
    """Time rounds that all processes begin together, behind one that is not counted."""
    seconds = []
    for _ in range(job.rounds + 1):
        job.context.wait()
        seconds.append(timed(run, job.device))
    return seconds[1:]
