"""Choose the FATReLU threshold that the finished model is saved with, on calibration text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transformers import PreTrainedModel

from sparsecast.core.messages import log
from sparsecast.core.models.activations import ActivationRule
from sparsecast.core.models.loading import set_activation
from sparsecast.core.text.tokens import TokenBatch
from sparsecast.sparsify.measure import Score, score, sweep
from sparsecast.sparsify.phases import Trained
from sparsecast.sparsify.plan import SparsifyPlan
from sparsecast.sparsify.prepare import TrainingSetup

CLOSE = 0.001
"""Sparsity that a threshold may miss the target by."""
HALVINGS = 20
Tried = list[tuple[float, Score]]
"""Thresholds and their scores, in the order in which they were tried."""


def choose_activation(
    plan: SparsifyPlan, setup: TrainingSetup, trained: Trained
) -> tuple[ActivationRule, Tried]:
    """Return the activation to save and the scores of every threshold that was tried.

    Plain ReLU is taken where it is as sparse as the target, and dReLU has no threshold.
    """
    if setup.rule.on_up:
        return setup.rule, []
    if plan.target is None:
        threshold, tried = sweep(setup.model, setup.calibration, plan.shift_tolerance)
    else:
        threshold, tried = meet_target(
            setup.model, setup.calibration, plan.target, trained.threshold, trained.bound
        )
        _tell(plan.target, trained.bound, dict(tried)[threshold])
    rounded = float(f"{threshold:.3g}")
    return (ActivationRule("fatrelu", rounded) if rounded else setup.rule), tried


def meet_target(
    model: PreTrainedModel,
    batches: Sequence[TokenBatch],
    target: float,
    start: float,
    bound: float | None = None,
) -> tuple[float, Tried]:
    """Choose the threshold at which `target` of x1 is zero, or a smaller one within `bound`.

    Args:
        target: Share of zeros, the mean over layers.
        start: The threshold of training.
        bound: Largest perplexity on `batches`; if even ReLU exceeds it, ReLU is chosen.

    Returns:
        The threshold, to three digits, and (threshold, score) of every candidate.
    """
    tried: dict[float, Score] = {}

    def at(threshold: float) -> Score:
        if threshold not in tried:
            set_activation(model, ActivationRule("fatrelu", threshold))
            tried[threshold] = score(model, batches)
        return tried[threshold]

    if at(0.0).sparsity >= target - CLOSE:
        return 0.0, list(tried.items())
    low, high = 0.0, float(f"{max(start, 1e-3):.3g}")
    while (sparsity := at(high).sparsity) < target - CLOSE:
        low, high = high, float(f"{2 * high:.3g}")
    chosen = high
    if sparsity > target + CLOSE:
        chosen = _halve(low, high, lambda t: at(t).sparsity - target)
    if bound is not None and at(chosen).perplexity > bound:
        chosen = _halve(0.0, chosen, lambda t: at(t).perplexity / bound - 1)
        within = [t for t, found in tried.items() if found.perplexity <= bound and t <= chosen]
        chosen = max(within, default=0.0)
    return chosen, list(tried.items())


def _halve(low: float, high: float, excess: Callable[[float], float]) -> float:
    """Return where `excess`, which rises, is about zero."""
    middle = high
    for _ in range(HALVINGS):
        middle = float(f"{(low + high) / 2:.3g}")
        if middle in (low, high):  # three digits tell no more
            break
        over = excess(middle)
        if abs(over) < CLOSE / 2:
            break
        low, high = (low, middle) if over > 0 else (middle, high)
    return middle


def _tell(target: float, bound: float | None, chosen: Score) -> None:
    if bound is not None and chosen.perplexity > bound:
        log.warning(
            f"calibration perplexity is {chosen.perplexity:.3f}, above the bound of {bound:.3f} "
            "even without a threshold; train on more tokens, or allow more"
        )
    elif chosen.sparsity < target - CLOSE and bound is None:
        log.warning(f"sparsity is {chosen.sparsity:.2%}, below the target of {target:.2%}")
