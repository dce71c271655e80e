"""The report's words: its terms, its verdict, and the sentences on perplexity and origin."""

from __future__ import annotations

from typing import Any

TERMS = {
    "recall": "of the neurons that fire, the share that is predicted; the rest is lost",
    "predicted sparsity": "the share of neurons that the engine skips",
    "true sparsity": "the share of neurons that are zero: the most that can be skipped without "
    "loss",
    "traffic": "bytes of FFN and predictor weights that PowerInfer reads per token, relative to "
    "the dense FFN in f16",
    "cascade": "traffic if the gates of the predicted neurons are read first, and their other "
    "weights only where the gate fires",
    "exact": "traffic without a predictor: every gate is read, and the other weights only where it "
    "fires; nothing is missed",
    "oracle": "traffic of a perfect predictor that takes no bytes",
}
"""Each term and its definition, to follow a colon."""
MIXTURE = (
    "A mixture of experts: counts are summed over the experts that tokens were routed to, traffic "
    "is that of a token's experts, and PowerInfer itself cannot run it."
)
WORTH = 0.9
"""A predictor is worth its misses below this share of the exact path's traffic."""


def verdict(result: dict[str, Any]) -> str:
    """Say whether these predictors are better than none."""
    mean = result["mean"]
    traffic, exact = mean["traffic"], mean["exact"]
    reads = (
        f"decoding reads {traffic:.3f} of the dense FFN's bytes, {traffic / exact:.2f} times the "
        f"exact path's {exact:.3f}"
    )
    if traffic >= 1:
        return f"Not worth it: {reads}. The model is not sparse enough for predictors."
    if traffic >= WORTH * exact:
        return (
            f"Not worth it: {reads}, which needs no predictor and misses nothing. Try a smaller "
            "rank, a lower recall or another format."
        )
    return f"Worth it: {reads}, and misses {1 - mean['recall']:.1%} of the neurons that fire."


def perplexity_sentence(result: dict[str, Any]) -> str:
    """State the changes in perplexity and the text they were measured on, or how to get them."""
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
        return (
            "The change in perplexity was not measured; run `sparsecast evaluate --json FILE` and "
            "report again with --evaluation FILE."
        )
    told = f"Change in perplexity on {result['evaluated_on']}: {' and '.join(parts)}."
    if result["bundle_perplexity_change"] is None:
        told += " There is none for PowerInfer (bundle), which cannot run this model."
    return told


def origin(result: dict[str, Any]) -> str:
    """State the text, date, version and command of a report."""
    return (
        f"Scored on {result['tokens']:,} held-out tokens of {result['corpus']} on {result['date']} "
        f"by sparsecast {result['version']}: {result['command']}"
    )
