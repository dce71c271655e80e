"""What a report says in sentences: the terms, where it comes from, and one sentence of verdict."""

from __future__ import annotations

from typing import Any

TERMS = {
    "recall": "of the neurons that fired, the share that was predicted; what is missed is lost",
    "predicted sparsity": "the share of neurons that the engine skips",
    "true sparsity": "the share that is exactly zero: the most that could be skipped for free",
    "traffic": "bytes of FFN and predictor weights that decoding reads per token in PowerInfer, "
    "over those of the dense FFN in f16",
    "cascade": "the same where the gate of the predicted neurons is read first, and the rest only "
    "where it fired",
    "exact": "the same without a predictor: the whole gate, and the rest where it fired; it cannot "
    "be wrong",
    "oracle": "the same for a perfect predictor that costs nothing",
}
EARNS = 0.9
"""A predictor is worth its misses below this share of the exact path's traffic."""


def verdict(result: dict[str, Any]) -> str:
    """One sentence: whether these predictors are better than none."""
    mean = result["mean"]
    traffic, exact, missed = mean["traffic"], mean["exact"], 1 - mean["recall"]
    beside = f"{traffic:.3f} of the dense FFN's bytes, {traffic / exact:.2f} times what the exact"
    beside += f" path reads ({exact:.3f}), which needs no predictor and cannot be wrong"
    if traffic >= 1:
        return f"Not worth it: decoding reads {beside}; the model is not sparse enough for them."
    if traffic >= EARNS * exact:
        return (
            f"Not worth it: decoding reads {beside}; a smaller rank, a lower recall or another "
            "format may be."
        )
    return f"Worth it: decoding reads {beside}; {missed:.1%} of what fires is missed."


def measured(result: dict[str, Any]) -> str:
    """The changes in perplexity, and on which text; or that there are none."""
    parts = []
    if result["perplexity_change"] is not None:
        parts.append(
            f"{result['perplexity_change']:+.2%} with the model's own activation (predicted)"
        )
    if result["bundle_perplexity_change"] is not None:
        parts.append(
            f"{result['bundle_perplexity_change']:+.2%} as PowerInfer computes it (bundle)"
        )
    if not parts:
        return "Perplexity was not evaluated: give --evaluation."
    return f"Perplexity behind the predictors, on {result['evaluated_on']}: {' and '.join(parts)}."


def origin(result: dict[str, Any]) -> str:
    """Text, date, version and command, in one sentence."""
    return (
        f"Scored on {result['tokens']:,} held-out tokens of {result['corpus']} on {result['date']} "
        f"by sparsecast {result['version']}: {result['command']}"
    )
