"""The shapes of random bundles and the operating points of their predictors, with their sources."""

from __future__ import annotations

from typing import NamedTuple

from sparsecast.cli.bench.export_model import ModelShape
from sparsecast.cli.bench.random_bundle.vocabulary import FIRST_WORD
from sparsecast.core.errors import InputError
from sparsecast.core.ggml_blocks import BLOCK
from sparsecast.predictors.formats import BITS
from sparsecast.predictors.training.rank_selection import default_rank

SHAPES = {
    "7b": ModelShape(hidden=4096, ffn=11008, layers=32, heads=32, kv_heads=32, vocab=32_000),
    "13b": ModelShape(hidden=5120, ffn=13824, layers=40, heads=40, kv_heads=40, vocab=32_000),
    "1b": ModelShape(hidden=1536, ffn=3840, layers=52, heads=24, kv_heads=8, vocab=73_440),
}
"""Llama 2 7B and 13B, which ProSparse-7B and -13B have, and MiniCPM-S-1B, by their config.json."""


class Point(NamedTuple):
    """What a layer of a random bundle and its predictor do, over all of its neurons and tokens."""

    rank: int
    format: str
    """Of the predictor: f16, q8_0 or q4_0."""
    recall: float
    predicted_sparsity: float
    true_sparsity: float = 0.8811
    """Of ProSparse-7B before the threshold shift (arXiv 2402.13516, table 2)."""
    hot_neurons: float = 0.26
    """Share of the neurons, the hottest, that have 80 % of all activations. 26 % is an assumption
    after PowerInfer's paper (arXiv 2312.12456), which has it of a whole 70B. Small models are less
    skewed: the hottest 26 % of tiny-prosparse have 40 %."""


def public_point(shape: ModelShape) -> Point:
    """The published predictors of ProSparse-7B: their rank relative to the hidden size, f16.

    Recall and predicted sparsity are those of ProSparse-7B* in arXiv 2402.13516, table 2, for
    every shape.
    """
    return Point(default_rank("reference", "f16", shape.hidden), "f16", 0.9346, 0.7524)


def our_point(shape: ModelShape) -> Point:
    """Predictors of `sparsecast train --target-recall 0.95`: the default rank in q4_0.

    Recall and predicted sparsity are those that docs/results.md has of the demo (rank 160 in q4_0,
    held-out tokens): 0.950 and 0.805, at a true sparsity of 0.870. They are not scaled to the
    higher sparsity of ProSparse-7B: at the demo's 1.5 predicted per active neuron, predicted
    sparsity would be 0.82 here. No 7B model has been trained for, so this is an assumption. The
    public recipe, trained on the same model, does worse than its published figures. The bytes are
    fewer: 0.080 of a 7B's FFN in f16, the public recipe's are 0.114.
    """
    return Point(default_rank("ours", "q4_0", shape.hidden), "q4_0", 0.950, 0.805)


def check(shape: ModelShape, dtype: str, point: Point) -> None:
    """Refuse what no random bundle can be.

    Raises:
        InputError: A dtype or format that PowerInfer's file does not have; sizes that do not divide
            into blocks (of 64 in the hidden size: a GPU build wants them); an FFN that the engine
            computes wrongly; a vocabulary without words; a rank that is too small or reads every
            channel.
    """
    if dtype not in ("f16", "q4_0"):
        raise InputError(f"dtype: got {dtype!r}, expected f16 or q4_0; choose one of them")
    if point.format not in BITS:
        raise InputError(f"format: got {point.format!r}, expected {', '.join(BITS)}; choose one")
    sizes = {"hidden": (shape.hidden, 2 * BLOCK), "ffn": (shape.ffn, BLOCK)}
    for name, (size, unit) in {**sizes, "rank": (point.rank, BLOCK)}.items():
        if size % unit:
            raise InputError(f"{name}: got {size}, expected a multiple of {unit}; round it")
    if shape.vocab <= FIRST_WORD:
        raise InputError(
            f"vocab: got {shape.vocab}, expected more than {FIRST_WORD}, the bytes and special "
            "tokens"
        )
    if shape.ffn <= 1000:
        raise InputError(
            f"ffn: got {shape.ffn}, expected more than 1000; the engine computes fewer in another "
            "way"
        )
    most = 2 * shape.hidden - 3 * BLOCK
    if not 3 * BLOCK <= point.rank <= most:
        raise InputError(
            f"rank: got {point.rank}, expected from {3 * BLOCK} to {most} at a hidden size of "
            f"{shape.hidden}; choose a rank between"
        )
