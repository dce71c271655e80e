"""Check on a collection's first batch that the model's activation fits its weights."""

from __future__ import annotations

from sparsecast.collect.plan import CollectionPlan
from sparsecast.collect.store.units import Unit
from sparsecast.core.interrupts import StopFlag
from sparsecast.core.messages import log
from sparsecast.core.models.loading import embedding_rows
from sparsecast.core.models.truth_check import (
    PUBLISHED_THRESHOLDS,
    candidates,
    check_activation,
    fits_in,
)
from sparsecast.core.text.tokens import TokenBatch

MOST_TOKENS, LEAST_TOKENS = 1_024, 384
MOST_PASSES = 7


def warn_of_activation(plan: CollectionPlan, unit: Unit, stop: StopFlag) -> None:
    """Warn in one line if another activation fits the model's weights better.

    See core/models/truth_check.py. Nothing that is recorded depends on it. It costs at most seven
    forward passes over the first rows of `unit`: 1/64 of the collection's tokens, but at least 384
    and at most 1,024 of them.
    """
    if not fits_in(plan.model):
        return
    given = plan.manifest.options.get("activation_threshold") is not None
    check = check_activation(
        plan.model,
        [_first_rows(unit.batches[0], checked_tokens(sum(plan.quotas.values())))],
        candidates(
            plan.manifest.rule,
            gated=plan.manifest.ffn_matrices == 3,
            thresholds=PUBLISHED_THRESHOLDS,
        ),
        vocabulary=embedding_rows(plan.model),
        says="--activation-threshold" if given else "config",
        on_pass=stop.check,
    )
    verdict = check.verdict
    if verdict.best is not None:
        log.warning(
            f"{plan.manifest.model}: {verdict.text} (first {check.tokens:,} tokens; `sparsecast "
            "inspect` with the model's name tries more)"
        )


def checked_tokens(tokens: int) -> int:
    """Return how many of a collection's tokens each pass reads."""
    return max(LEAST_TOKENS, min(MOST_TOKENS, tokens // 64))


def _first_rows(batch: TokenBatch, limit: int) -> TokenBatch:
    """Return the rows of a batch that fit into `limit` tokens, or part of the first one."""
    rows = max(1, limit // batch.ids_BS.shape[1])
    return TokenBatch(batch.split, batch.ids_BS[:rows, :limit], batch.keep_BS[:rows, :limit])
