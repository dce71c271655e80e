"""Train the phases of a run: pre-training, the baselines, ProSparse.

A finished phase leaves `<name>.pt` in the work folder. The current phase writes `<name>.ckpt` every
`CHECKPOINT_STEPS` steps and on an interrupt.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from typing import Any, NamedTuple

from torch import nn

from sparsecast.core.errors import InputError
from sparsecast.core.messages import log
from sparsecast.core.models.activations import FATReLU
from sparsecast.core.models.families import family_of
from sparsecast.sparsify.measure import Score, score, sweep
from sparsecast.sparsify.plan import SparsifyPlan
from sparsecast.sparsify.prepare import TrainingSetup
from sparsecast.sparsify.training.fit import train_phase
from sparsecast.sparsify.training.lightning_module import Phase
from sparsecast.sparsify.training.perplexity_guard import PerplexityGuard
from sparsecast.sparsify.training.raised_threshold import (
    UPDATE_STEPS,
    RaisedFATReLU,
    RaisedThreshold,
)
from sparsecast.sparsify.work_folder import Diverged, WorkFolder

DECAY_SHARE = 0.5
"""Last part of the sparse training, in which the learning rate falls if the stages do not say."""
BEFORE, AFTER = "ProSparse before the shift", "ProSparse after the shift"
RAISED = "raised threshold"
NAMES = {"silu": "SiLU", "gelu": "GELU", "relu": "ReLU", "fatrelu": "FATReLU", "drelu": "dReLU"}
NAMES |= {"gelu_new": "GELU", "gelu_pytorch_tanh": "GELU"}


class Trained(NamedTuple):
    """What the phases came to; the weights are in the model."""

    scores: dict[str, Score]
    """Of each branch on held-out text."""
    threshold: float
    """Of the last branch at its end; 0 in ProSparse's recipe, which has none yet."""
    bound: float | None
    """Largest calibration perplexity that sparsity may lead to."""


def train_all(
    plan: SparsifyPlan,
    setup: TrainingSetup,
    work: WorkFolder,
    on_branch: Callable[[str], object] = lambda name: None,
) -> Trained:
    """Train every phase and score each branch on held-out text.

    `setup.model` ends with the weights of the last branch: of the recipe that is saved.

    Args:
        on_branch: Called with the name of each branch while `setup.model` has its weights.

    Raises:
        Diverged: Training has destroyed the model.
    """
    model, optimizer = setup.model, None
    log.info(f"{plan.steps:,} steps of {plan.batch_size * plan.seq_len:,} tokens")
    if plan.pretrain_steps:
        phase = _phase(plan, "pre-training", 0, plan.pretrain_steps)
        optimizer = train_phase(plan, setup, phase, work, optimizer)
    trunk = {name: value.to("cpu", copy=True) for name, value in model.state_dict().items()}
    raised, guard, bound = _raised(plan, setup)
    scores: dict[str, Score] = {}
    branches = _branches(plan, setup, raised)
    for branch in branches:
        model.load_state_dict(trunk)
        put_activation(branch.activation, model)
        start, stop = plan.pretrain_steps, plan.steps
        phase = _phase(plan, branch.name, start, stop, branch.l1, branch.progressive)
        if branch.name == RAISED:
            train_phase(plan, setup, phase, work, optimizer, raised, guard)
            assert raised is not None
            put_activation(FATReLU(raised.threshold.item()), model)
        else:
            train_phase(plan, setup, phase, work, optimizer)
        result = _scored(branch.name, scores, setup)
        check_score(result, phase, plan.l1, recipe=branch is branches[-1])
        on_branch(branch.name)
        if branch.name == BEFORE and plan.target is not None:
            sweep(model, setup.calibration, plan.shift_tolerance)
            _scored(AFTER, scores, setup)
    return Trained(scores, 0.0 if raised is None else raised.threshold.item(), bound)


def _raised(
    plan: SparsifyPlan, setup: TrainingSetup
) -> tuple[RaisedThreshold | None, PerplexityGuard | None, float | None]:
    """Return the threshold to raise, what stops it, and the bound of calibration perplexity.

    The model must still be dense: the bound is relative to it.
    """
    if plan.target is None:
        return None, None, None
    steps = plan.steps - plan.pretrain_steps
    if steps <= UPDATE_STEPS:
        log.warning(
            f"{steps} steps of sparse training are too few for the threshold to rise in them; it "
            "is chosen at the end alone. Give more --tokens"
        )
    raised = RaisedThreshold(plan.target, steps).to(plan.device)
    if plan.max_increase is None:
        return raised, None, None
    allowed = 1 + plan.max_increase
    of_batch, of_all = (
        allowed * _finite(score(setup.model, batches).perplexity, plan)
        for batches in (setup.calibration[:1], setup.calibration)
    )
    return raised, PerplexityGuard(raised, setup.calibration[0], of_batch, steps), of_all


def _finite(value: float, plan: SparsifyPlan) -> float:
    if not isfinite(value):
        source = "the pre-training" if plan.checkpoint is None else plan.checkpoint.source
        raise InputError(
            f"{source}: its perplexity is {value}, expected a finite number for "
            "--max-perplexity-increase to compare with; start from another model"
        )
    return value


def put_activation(activation: nn.Module, model: Any) -> None:
    """Let every FFN compute `activation` in place of its own."""
    family = family_of(model.config, "model")
    parent, _, attribute = family.act.rpartition(".")
    for layer in family.decoder_layers(model):
        setattr(layer.get_submodule(parent), attribute, activation)


def _scored(name: str, scores: dict[str, Score], setup: TrainingSetup) -> Score:
    result = scores[name] = score(setup.model, setup.held_out)
    log.info(f"{name}: perplexity {result.perplexity:.3f}, sparsity {result.sparsity:.2%}")
    return result


class Branch(NamedTuple):
    """A training that begins where the others of the run do."""

    name: str
    activation: nn.Module
    l1: float = 0.0
    """Final weight of the L1 term."""
    progressive: bool = True
    """Whether that weight grows in stages."""


def _branches(
    plan: SparsifyPlan, setup: TrainingSetup, raised: RaisedThreshold | None
) -> list[Branch]:
    family = family_of(setup.model.config, "model")
    sparse = setup.rule.module()
    prosparse = Branch(BEFORE, sparse, plan.l1)
    recipe = prosparse if raised is None else Branch(RAISED, RaisedFATReLU(raised))
    if not plan.baselines:
        return [recipe]
    act = str(getattr(setup.model.config, family.act_key))
    original = family.decoder_layers(setup.model)[0].get_submodule(family.act)
    found = [Branch(f"{NAMES.get(act, act)} original", original)]
    if act != setup.rule.name:
        found.append(Branch(f"plain {NAMES[setup.rule.name]}", sparse))
    found += [Branch("fixed L1", sparse, plan.l1, progressive=False), prosparse]
    return found if raised is None else [*found, recipe]


def check_score(result: Score, phase: Phase, l1: float, *, recipe: bool = True) -> None:
    """Raise `Diverged` if training has destroyed the model or silenced its neurons."""
    if not isfinite(result.perplexity):
        raise Diverged(
            f"{phase.lr_option} {phase.lr:g}: training diverged, {phase.name} has a held-out "
            f"perplexity of {result.perplexity}; choose a smaller {phase.lr_option}"
        )
    if result.sparsity == 1:
        silent = f"no neuron of {phase.name} fires any more on held-out text"
        lr = phase.lr_option
        if phase.name == RAISED:
            raise Diverged(f"{lr} {phase.lr:g}: {silent}; choose a smaller {lr}")
        if recipe:
            raise Diverged(f"--l1 {l1:g}: {silent}; choose a smaller --l1 or {lr}")
        log.warning(silent)


def _phase(
    plan: SparsifyPlan,
    name: str,
    first: int,
    stop: int,
    l1: float = 0.0,
    progressive: bool = True,
) -> Phase:
    table = plan.stages
    share = 1 - table.regularized[-1].until / table.steps if table.decay else DECAY_SHARE
    return Phase(
        name=name,
        start=first,
        stop=stop,
        l1=l1,
        lr=plan.lr,
        warmup=min(500, plan.steps // 20 + 1),
        decay_from=plan.steps - int(share * (plan.steps - plan.pretrain_steps)),
        stages=table if progressive else None,
    )
