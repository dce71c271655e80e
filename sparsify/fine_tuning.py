"""Supervised fine-tuning on the answers of chats, behind the sparse training."""

from __future__ import annotations

from typing import Any

from sparsecast.core.messages import log
from sparsecast.sparsify.chats import answer_perplexity
from sparsecast.sparsify.measure import Score, score
from sparsecast.sparsify.phases import DECAY_SHARE, check_score
from sparsecast.sparsify.plan import SparsifyPlan, publishable_name
from sparsecast.sparsify.prepare import TrainingSetup
from sparsecast.sparsify.training.fit import train_phase
from sparsecast.sparsify.training.lightning_module import Phase
from sparsecast.sparsify.work_folder import WorkFolder


def fine_tune(
    plan: SparsifyPlan, setup: TrainingSetup, work: WorkFolder, scores: dict[str, Score]
) -> dict[str, Any] | None:
    """Train on the answers of chats, if that is planned, and add a row to `scores`.

    The optimizer is a new one. Lambda is constant: the part of `plan.l1` that it is in the table,
    and 0 with a target, whose threshold stays as it is.

    Returns:
        What the record says of it, with the perplexity of held-out answers.
    """
    if setup.chats is None:
        return None
    assert plan.sft_corpus is not None
    table, held_out = plan.stages, setup.chats.held_out_N2S
    share = table.sft.weight / table.last_weight if table.sft else 1.0
    phase = Phase(
        name="supervised fine-tuning",
        start=0,
        stop=plan.sft_steps,
        l1=0.0 if plan.target is not None else plan.l1 * share,
        stages=None,
        answers=True,
        lr=plan.sft_lr,
        warmup=min(500, plan.sft_steps // 20 + 1),
        decay_from=plan.sft_steps - int(DECAY_SHARE * plan.sft_steps),
    )
    before = answer_perplexity(setup.model, held_out)
    train_phase(plan, setup, phase, work, None)
    result = scores["fine-tuned"] = score(setup.model, setup.held_out)
    check_score(result, phase, plan.l1)
    after = answer_perplexity(setup.model, held_out)
    log.info(
        f"{phase.name}: perplexity of held-out answers {before:.3f}, now {after:.3f}; of text "
        f"{result.perplexity:.3f}, sparsity {result.sparsity:.2%}"
    )
    return {
        "corpus": publishable_name(plan.sft_corpus),
        "tokens": plan.sft_tokens,
        "l1": phase.l1,
        "lr": phase.lr,
        "answer_perplexity": {"before": before, "after": after},
    }
