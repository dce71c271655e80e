"""Train the phases of a run: pre-training, the baselines, ProSparse, supervised fine-tuning.

A finished phase leaves `<name>.pt` in the work folder. The current phase writes `<name>.ckpt` every
`CHECKPOINT_STEPS` steps and on an interrupt.
"""

from __future__ import annotations

from math import isfinite
from typing import Any, NamedTuple

from torch import nn

from sparsecast.core.messages import log
from sparsecast.core.models.families import family_of
from sparsecast.sparsify.chats import answer_perplexity
from sparsecast.sparsify.measure import Score, score
from sparsecast.sparsify.plan import SparsifyPlan, publishable_name
from sparsecast.sparsify.prepare import TrainingSetup
from sparsecast.sparsify.training.fit import train_phase
from sparsecast.sparsify.training.lightning_module import Phase
from sparsecast.sparsify.work_folder import Diverged, WorkFolder

DECAY_SHARE = 0.5
"""Last part of the sparse training, in which the learning rate falls if the stages do not say."""
NAMES = {"silu": "SiLU", "gelu": "GELU", "relu": "ReLU", "fatrelu": "FATReLU", "drelu": "dReLU"}
NAMES |= {"gelu_new": "GELU", "gelu_pytorch_tanh": "GELU"}


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
        optimizer = train_phase(plan, setup, phase, work, optimizer)
    trunk = {name: value.clone() for name, value in model.state_dict().items()}
    family = family_of(model.config, "model")
    parent, _, attribute = family.act.rpartition(".")
    scores = {}
    for branch in _branches(plan, setup):
        name = branch.name
        model.load_state_dict(trunk)
        for layer in family.decoder_layers(model):
            setattr(layer.get_submodule(parent), attribute, branch.activation)
        start, stop = plan.pretrain_steps, plan.steps
        phase = _phase(plan, name, start, stop, branch.l1, branch.progressive)
        train_phase(plan, setup, phase, work, optimizer)
        result = scores[name] = score(model, setup.held_out)
        _check_score(result, phase, plan.l1)
        log.info(f"{name}: perplexity {result.perplexity:.3f}, sparsity {result.sparsity:.2%}")
    return scores


def fine_tune(
    plan: SparsifyPlan, setup: TrainingSetup, work: WorkFolder, scores: dict[str, Score]
) -> dict[str, Any] | None:
    """Train on the answers of chats, if that is planned, and add a row to `scores`.

    The optimizer is a new one. Lambda is constant: the part of `plan.l1` that it is in the table.

    Returns:
        What the record says of it, with the perplexity of held-out answers.
    """
    if setup.chats is None:
        return None
    assert plan.sft_corpus is not None
    table, held_out = plan.stages, setup.chats.held_out_N2S
    phase = Phase(
        name="supervised fine-tuning",
        start=0,
        stop=plan.sft_steps,
        l1=plan.l1 * (table.sft.weight / table.last_weight if table.sft else 1.0),
        stages=None,
        answers=True,
        lr=plan.lr,
        warmup=min(500, plan.sft_steps // 20 + 1),
        decay_from=plan.sft_steps - int(DECAY_SHARE * plan.sft_steps),
    )
    before = answer_perplexity(setup.model, held_out)
    train_phase(plan, setup, phase, work, None)
    result = scores["ProSparse fine-tuned"] = score(setup.model, setup.held_out)
    _check_score(result, phase, plan.l1)
    after = answer_perplexity(setup.model, held_out)
    log.info(
        f"{phase.name}: perplexity of held-out answers {before:.3f}, now {after:.3f}; of text "
        f"{result.perplexity:.3f}, sparsity {result.sparsity:.2%}"
    )
    return {
        "corpus": publishable_name(plan.sft_corpus),
        "tokens": plan.sft_tokens,
        "l1": phase.l1,
        "answer_perplexity": {"before": before, "after": after},
    }


class Branch(NamedTuple):
    """A training that begins where the others of the run do."""

    name: str
    activation: nn.Module
    l1: float = 0.0
    """Final weight of the L1 term."""
    progressive: bool = True
    """Whether that weight grows in stages."""


def _branches(plan: SparsifyPlan, setup: TrainingSetup) -> list[Branch]:
    family = family_of(setup.model.config, "model")
    sparse = setup.rule.module()
    last = Branch("ProSparse before the shift", sparse, plan.l1)
    if not plan.baselines:
        return [last]
    act = str(getattr(setup.model.config, family.act_key))
    original = family.decoder_layers(setup.model)[0].get_submodule(family.act)
    found = [Branch(f"{NAMES.get(act, act)} original", original)]
    if act != setup.rule.name:
        found.append(Branch(f"plain {NAMES[setup.rule.name]}", sparse))
    return [*found, Branch("fixed L1", sparse, plan.l1, progressive=False), last]


def _check_score(result: Score, phase: Phase, l1: float) -> None:
    if not isfinite(result.perplexity):
        raise Diverged(
            f"--lr {phase.lr:g}: training diverged, {phase.name} has a held-out perplexity of "
            f"{result.perplexity}; choose a smaller --lr"
        )
    if result.sparsity == 1:
        silent = f"no neuron of {phase.name} fires any more on held-out text"
        if phase.stages is not None:
            raise Diverged(f"--l1 {l1:g}: {silent}; choose a smaller --l1 or --lr")
        log.warning(silent)  # ProSparse's stages may still avoid it


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
