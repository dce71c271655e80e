"""Train one phase of a run, with checkpoints that a killed run goes on from."""

from __future__ import annotations

import gc
import warnings
from contextlib import suppress
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from sparsecast.core.distributed import DistributedContext, check_shared, int_from_environment
from sparsecast.core.interrupts import StopFlag, interrupt_like, stop_on_signal
from sparsecast.core.lightning import (
    StagedCheckpoints,
    StopBetweenSteps,
    TrainingBar,
    cluster_environment,
    quiet_lightning,
)
from sparsecast.core.messages import log
from sparsecast.core.models.loading import pick_device
from sparsecast.core.torch_files import load_state, save_torch
from sparsecast.sparsify.chats import AnswerBatches
from sparsecast.sparsify.plan import SparsifyPlan
from sparsecast.sparsify.prepare import TrainingSetup
from sparsecast.sparsify.sequences import Batches
from sparsecast.sparsify.training.curve_table import CURVES
from sparsecast.sparsify.training.curves import Curves
from sparsecast.sparsify.training.lightning_module import Phase, SparsifyModule
from sparsecast.sparsify.training.perplexity_guard import PerplexityGuard
from sparsecast.sparsify.training.raised_threshold import RaisedThreshold
from sparsecast.sparsify.training.sharding import (
    ShardedModule,
    ShardedStrategy,
    local,
    whole_state,
    without_weights,
)
from sparsecast.sparsify.training.team import Team
from sparsecast.sparsify.work_folder import Diverged, WorkFolder

CHECKPOINT_STEPS = 500
LOSS_CHECK_STEPS = 50
"""Steps between two checks of the loss; each check waits for the device."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A phase to train, the same for every process; it is pickled on its way to them."""

    model: Any
    """Trained in place. In several processes it has no weights; see `without_weights`."""
    phase: Phase
    raised: RaisedThreshold | None
    """The threshold that the model's activations share."""
    guard: PerplexityGuard | None
    data: Batches | AnswerBatches
    step: int
    """Steps that an interrupted start has done."""
    last: Path
    """The checkpoint."""
    curves: Path
    step_tokens: int
    micro_batch: int | None
    checkpoint_activations: bool
    compile: bool


def train_phase(
    plan: SparsifyPlan,
    setup: TrainingSetup,
    phase: Phase,
    work: WorkFolder,
    optimizer: dict[str, Any] | None,
    raised: RaisedThreshold | None = None,
    guard: PerplexityGuard | None = None,
) -> dict[str, Any]:
    """Train one phase or load its finished weights; return the state of the optimizer.

    Args:
        optimizer: State of the phase before.
        raised: The threshold of the model's activations, which training moves.
        guard: Stops its rise.
    """
    slug = phase.name.replace(" ", "-")
    done, last = work.path / f"{slug}.pt", work.path / f"{slug}.ckpt"
    several = plan.team.context.size > 1
    if done.is_file():
        saved = load_state(done, "model", "optimizer", *(["raised"] if raised is not None else []))
        setup.model.load_state_dict(saved["model"])
        if raised is not None:
            raised.load_state_dict(saved["raised"])
        earlier: dict[str, Any] = saved["optimizer"]
        return earlier
    step = _steps_done(phase, last)
    if several:
        setup.model.to("cpu")
    parts = (setup.model, raised, guard)
    model, its_threshold, its_guard = without_weights(*parts) if several else parts
    task = Task(
        model=model,
        phase=phase,
        raised=its_threshold,
        guard=its_guard,
        data=_data(plan, setup, phase, phase.start + step),
        step=step,
        last=last,
        curves=work.path / CURVES,
        step_tokens=plan.batch_size * plan.seq_len,
        micro_batch=plan.micro_batch,
        checkpoint_activations=plan.checkpoint_activations,
        compile=plan.compile,
    )
    if several:
        plan.team.context.share(task)
    state = _fit(task, plan.team, plan.device, setup.model, optimizer)
    finished = {}
    if raised is not None and task.raised is not None:
        raised.load_state_dict(task.raised.state_dict())
        finished["raised"] = raised.state_dict()
    del task, model
    if several:
        gc.collect()  # the shares of the weights, before the device takes all of them
    setup.model.to(plan.device)  # Lightning leaves it on the CPU
    save_torch(finished | {"model": setup.model.state_dict(), "optimizer": state}, done)
    last.unlink(missing_ok=True)
    return state


def _steps_done(phase: Phase, last: Path) -> int:
    """Return the steps that an interrupted start has done, and tell."""
    if not last.is_file():
        log.info(f"{phase.name}: {phase.stop - phase.start:,} steps")
        return 0
    step: int = load_state(last, "global_step", "state_dict", "optimizer_states")["global_step"]
    log.info(f"{phase.name}: resuming at step {step:,}")
    return step


def _data(
    plan: SparsifyPlan, setup: TrainingSetup, phase: Phase, first: int
) -> Batches | AnswerBatches:
    if phase.answers:
        assert setup.chats is not None
        return AnswerBatches(setup.chats.train_N2S, plan.batch_size, plan.seed, first)
    return Batches(setup.rows, plan.seq_len, plan.batch_size, plan.seed, first)


def follow(team: Team, device_name: str) -> None:
    """Train what the leading process trains, until that is done or ends."""
    torch.set_float32_matmul_precision("high")
    while (task := team.context.share(None)) is not None:
        device = pick_device(team.context.device(device_name))
        with suppress(Diverged, KeyboardInterrupt):  # the leading process has them too, and tells
            _fit(task, team, device, None, None)
        del task
        gc.collect()
        if not team.waiting:
            raise KeyboardInterrupt


def _fit(
    task: Task,
    team: Team,
    device: torch.device,
    source: Any,
    optimizer: dict[str, Any] | None,
) -> dict[str, Any]:
    """Train a phase with every process of a team; return the optimizer's state, unsharded.

    Args:
        source: The model with the weights, which it gets back; None on processes that follow.
    """
    context = team.context
    options: dict[str, Any] = {
        "compile": task.compile,
        "micro_batch": task.micro_batch,
        "checkpoint_activations": task.checkpoint_activations,
        "raised": None if task.raised is None else task.raised.to(device),
    }
    if context.size > 1:
        sharded = ShardedModule(
            task.model, task.phase, optimizer, context=context, source=source, **options
        )
        module: SparsifyModule = sharded
    else:
        module = SparsifyModule(task.model, task.phase, optimizer, **options)
    task.data.take_part(context.rank, context.size)
    team.waiting = False
    check_shared(task.last.parent, context)
    try:
        with stop_on_signal() as stop, quiet_lightning():
            # OPT's layers return views. Nothing writes into them, which FSDP2 warns about.
            warnings.filterwarnings("ignore", "FSDP2-wrapped module")
            trainer = phase_trainer(task.phase, _callbacks(task, team, stop), team.context, device)
            trainer.fit(
                module,
                DataLoader(task.data, batch_size=None, pin_memory=device.type == "cuda"),
                ckpt_path=str(task.last) if task.step else None,
                weights_only=True,
            )
    except SystemExit as ended:  # Lightning turns an interrupt into this
        if isinstance(ended.__context__, KeyboardInterrupt):
            raise interrupt_like(ended) from ended
        raise
    finally:
        module.remove_hooks()
    state: dict[str, Any] = trainer.optimizers[0].state_dict()
    if context.size > 1:
        sharded.gather()
        state = whole_state(state, keep=context.leads)
    team.waiting = True
    return state


def _callbacks(task: Task, team: Team, stop: StopFlag) -> list[Callback]:
    """Return the callbacks; what changes the state of training comes before the checkpoints."""
    found: list[Callback] = [TrainingBar(task.phase.name)] if team.context.leads else []
    found.append(Curves(task.curves, task.phase, task.step_tokens))
    if task.guard is not None:
        found.append(task.guard)
    return [*found, _Checkpoints(task, team, stop)]


class _Checkpoints(StopBetweenSteps):
    """Write checkpoints atomically, and raise `Diverged` before writing a broken one."""

    def __init__(self, task: Task, team: Team, stop: StopFlag) -> None:
        super().__init__(stop)
        self._last = task.last
        self._phase = task.phase
        self._team = team

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any
    ) -> None:
        step, end = trainer.global_step, self._phase.stop - self._phase.start
        context = self._team.context
        stop = context.any(self._stop.asked)
        due = step % CHECKPOINT_STEPS == 0 or stop
        if step % LOSS_CHECK_STEPS == 0 or due or step == end:
            loss = float(outputs["loss"])
            whole = not (due or step == end) or all(
                bool(local(weight).isfinite().all()) for weight in pl_module.parameters()
            )
            if context.any(not isfinite(loss) or not whole):
                self._team.waiting = True
                raise Diverged(
                    f"{self._phase.lr_option} {self._phase.lr:g}: training diverged in "
                    f"{self._phase.name} by step {step:,}, the loss is {loss:g}; choose a smaller "
                    + self._phase.lr_option
                    + (f" or an --l1 below {self._phase.l1:g}" if self._phase.l1 else "")
                )
        if due and step < end:
            trainer.save_checkpoint(self._last)
        if stop:
            self._team.waiting = True
            self._stop.asked = True
        self._stop.check()


def phase_trainer(
    phase: Phase, callbacks: list[Callback], context: DistributedContext, device: torch.device
) -> L.Trainer:
    """Return the trainer of a phase, which shares the weights between several processes."""
    on_gpu = device.type == "cuda"
    placement: dict[str, Any] = {"devices": [device.index or 0] if on_gpu else 1}
    if context.size > 1:
        here = int_from_environment("LOCAL_WORLD_SIZE", context.size, least=1)
        placement = {
            "devices": here,
            "num_nodes": context.size // here,
            "strategy": ShardedStrategy(context),
        }
    return L.Trainer(
        max_steps=phase.stop - phase.start,
        accelerator="gpu" if on_gpu else "cpu",
        precision="bf16-mixed" if on_gpu else "32-true",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=callbacks,
        plugins=[cluster_environment(), StagedCheckpoints()],
        **placement,
    )
