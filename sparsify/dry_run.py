"""What a run will take: memory, disk and time, before anything is loaded or written.

Weights, gradients and AdamW's moments follow from the number of parameters. Activations and time
are measured: the first one and two decoder layers of the model, with random weights, take real
steps on this device, compiled as in training, and what the second layer adds is multiplied by the
number of layers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from sparsecast.core.disk import format_bytes, free_bytes
from sparsecast.core.dry_run import seconds_of, show_rows
from sparsecast.core.models.first_layers import first_layers
from sparsecast.core.models.loading import set_activation
from sparsecast.core.models.pretrained import empty_model, random_model
from sparsecast.sparsify.phases import put_activation
from sparsecast.sparsify.plan import SparsifyPlan
from sparsecast.sparsify.prepare import STATE_BYTES, planned_config, sparse_rule
from sparsecast.sparsify.training.cross_entropy import CHUNK_LOGITS
from sparsecast.sparsify.training.lightning_module import Phase, SparsifyModule
from sparsecast.sparsify.training.raised_threshold import RaisedFATReLU, RaisedThreshold
from sparsecast.sparsify.work_folder import disk_needed

TIMED = 2
"""Steps that are timed, behind one that is not."""
BYTES_PER_LOGIT = 12
"""A product in bfloat16, its float32 copy, probabilities, and their gradient in bfloat16."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A model cut to a few layers; a pass is forward and backward of one micro-batch."""

    parameters: float
    saved: float
    """Bytes that autograd keeps from the forward pass of one micro-batch."""
    pass_seconds: float
    update_seconds: float
    """Clipping and AdamW."""

    def at(self, layers: int, two: Measured) -> Measured:
        """Extrapolate from this model of one layer and one of two."""
        return Measured(
            **{
                field.name: (one := getattr(self, field.name))
                + (layers - 1) * (getattr(two, field.name) - one)
                for field in fields(self)
            }
        )


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a run takes; bytes are per device."""

    parameters: int
    steps: int
    tokens: int
    processes: int
    persistent: int
    """Bytes of weights, gradients and AdamW's two moments, all float32."""
    gathered: int
    """Bytes of weights and gradients that are whole for a while, with several processes."""
    activations: int
    logits: int
    disk: int
    seconds: float | None
    """Of the optimizer steps of all phases; None if a micro-batch does not fit the device."""


def forecast(plan: SparsifyPlan) -> Forecast:
    """Compute and measure what a run will take. Writes nothing, and loads no weights."""
    config = planned_config(plan)
    parameters = empty_model(config).num_parameters()
    processes = plan.team.context.size
    local = plan.batch_size // processes
    micro = min(plan.micro_batch or local, local)
    layers = int(config.num_hidden_layers)
    measured: list[Measured] = []
    with suppress(torch.OutOfMemoryError):
        measured = [_measure(plan, config, count, micro) for count in (1, 2)]
    gathered = activations = 0
    seconds = None
    if measured:
        one, two = measured
        whole, layer = one.at(layers, two), two.parameters - one.parameters
        outer = one.parameters - layer
        # Two layers' weights, as the next one is fetched early, and one layer's gradients.
        gathered = round(4 * (3 * layer + 2 * outer)) if processes > 1 else 0
        activations = round(whole.saved)
        if plan.checkpoint_activations:
            kept = 4 * micro * plan.seq_len * config.hidden_size
            activations = round(one.saved) + layers * kept
        passes = -(-local // micro)
        step = passes * whole.pass_seconds + whole.update_seconds / processes
        seconds = step * _all_steps(plan)
    wide = plan.tokens * (2 if config.vocab_size <= 1 << 16 else 4)
    return Forecast(
        parameters=parameters,
        steps=plan.steps,
        tokens=plan.tokens,
        processes=processes,
        persistent=STATE_BYTES * parameters // processes,
        gathered=gathered,
        activations=activations,
        logits=BYTES_PER_LOGIT * min(CHUNK_LOGITS, micro * plan.seq_len * config.vocab_size),
        disk=int(disk_needed(parameters, plan.phases, wide, plan.dtype.itemsize)),
        seconds=seconds,
    )


def _all_steps(plan: SparsifyPlan) -> int:
    """Return the steps of all phases; the baselines repeat those after pre-training."""
    branches = plan.phases - int(plan.pretrain_steps > 0) - int(plan.sft_steps > 0)
    sparse = branches * (plan.steps - plan.pretrain_steps)
    return plan.pretrain_steps + sparse + plan.sft_steps


def _measure(plan: SparsifyPlan, config: PreTrainedConfig, layers: int, micro: int) -> Measured:
    """Train the first layers of a model, with random weights, for a few steps on this device."""
    cut: Any = first_layers(config, layers)
    model: Any = random_model(cut, plan.device)
    set_activation(model, sparse_rule(config))
    raised = None if plan.target is None else RaisedThreshold(plan.target, 1).to(plan.device)
    if raised is not None:
        put_activation(RaisedFATReLU(raised), model)
    phase = Phase(name="", start=0, stop=1, l1=plan.l1, lr=plan.lr, warmup=1, decay_from=1)
    ids_BS = torch.randint(cut.vocab_size, (micro, plan.seq_len), device=plan.device)
    module = SparsifyModule(model, phase, compile=plan.compile, raised=raised)
    _backward(module, ids_BS)  # compiles, if the run does
    saved = _saved_bytes(lambda: _loss(module, ids_BS), model)
    if plan.checkpoint_activations:
        module.remove_hooks()
        module = SparsifyModule(model, phase, checkpoint_activations=True, raised=raised)
    optimizer = module.configure_optimizers()["optimizer"]

    def update() -> None:
        module.configure_gradient_clipping()
        optimizer.step()

    passes, updates = [], []
    for _ in range(1 + TIMED):
        optimizer.zero_grad()
        passes.append(seconds_of(partial(_backward, module, ids_BS), plan.device))
        updates.append(seconds_of(update, plan.device))
    return Measured(
        parameters=model.num_parameters(),
        saved=saved,
        pass_seconds=min(passes[1:]),
        update_seconds=min(updates[1:]),
    )


def _loss(module: SparsifyModule, ids_BS: Tensor) -> Tensor:
    on_gpu = ids_BS.is_cuda
    with torch.autocast(ids_BS.device.type, torch.bfloat16, enabled=on_gpu):
        targets = torch.tensor(float(ids_BS[:, 1:].numel()), device=ids_BS.device)
        return module.loss([ids_BS], targets, 1.0)[0]


def _backward(module: SparsifyModule, ids_BS: Tensor) -> None:
    torch.autograd.backward(_loss(module, ids_BS))


def _saved_bytes(forward: Callable[[], object], model: Any) -> int:
    """Return the bytes of the tensors that a forward pass keeps for backward, but parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        result = forward()  # keeps them, so that no two have the same address
    del result
    return sum(kept.values())


def show_forecast(plan: SparsifyPlan) -> Forecast:
    """Print `forecast` as a table and return it."""
    found = forecast(plan)
    total = found.persistent + found.gathered + found.activations + found.logits
    several = f" on each of {found.processes} devices" if found.processes > 1 else ""
    rows = {
        "parameters": f"{found.parameters:,}",
        "steps, tokens": f"{found.steps:,}, {found.tokens:,}",
        f"memory{several}": format_bytes(total),
        "  weights, gradients, moments": format_bytes(found.persistent),
        "  gathered weights and gradients": format_bytes(found.gathered),
        "  activations of a micro-batch": format_bytes(found.activations),
        "  logits": format_bytes(found.logits),
        "disk": f"{format_bytes(found.disk)}, {format_bytes(free_bytes(plan.out))} are free",
        "time": _time(found, plan),
    }
    if found.seconds is None:
        rows["  activations of a micro-batch"] = "do not fit this device; choose a --micro-batch"
    if not found.gathered:
        del rows["  gathered weights and gradients"]
    show_rows(f"{plan.out}: nothing is trained or written", rows)
    return found


def _time(found: Forecast, plan: SparsifyPlan) -> str:
    if found.seconds is None:
        return "not measured"
    without = ["tokenizing", "scores"]
    without += ["exchange between processes"] if found.processes > 1 else []
    return (
        f"{timedelta(seconds=round(found.seconds))}, from steps of one and of two decoder layers "
        f"measured on this device; without {', '.join(without)}"
    )
