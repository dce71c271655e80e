"""Whether a file's predictors decide, and cost, what their calibration says.

Decisions, layer by layer. On the given text, with the model's own activation, every neuron either
fires or not, and the file's predictor lets it through or not. What a predictor knows is recall
minus the share of silent neurons that it lets through: 1 for a perfect one, 0 for one that does not
look at its input, whatever it claims, such as another layer's or one of zeros. Text of another kind
lowers it, so a layer fails below `KEPT` = half of what its calibration shows, and by no less than
`SLACK` = 0.1 where that is little: predictors that know next to nothing are blind either way.
Measured on tiny-prosparse, calibrated on its own corpus to 0.79 to 0.83: 0.92 to 1.0 of that on
held-out text, C++ headers and licenses, 0.56 at the least on random characters of scripts that it
has never seen; below 0.04 with the predictors of two layers swapped, 0 with zeros.
A short text is allowed `ERRORS` = 4 standard errors more. They are those of a ratio over blocks of
32 tokens, since neighboring tokens are alike, and grow by the calibration's own error where the
manifest says on how many tokens it was taken. At 256 tokens that is about 0.02, at 2,048 0.01.

Cost. A predictor misses neurons that would have hardly mattered, so its perplexity must not exceed
that of the same file with decisions drawn at random at the calibration's rates: as many misses, and
as many silent neurons let through. Again 4 standard errors are allowed, of the differences of the
two on the same tokens in blocks of 21, and `FLOOR` = 0.2 % where the calibration misses nothing.
Measured on tiny-prosparse at 2,048 tokens of held-out text: 1.1 % where 31 % are allowed (16 % and
the errors), with two layers swapped 40 % to 4,400 %. On 1,024 tokens of C++ headers 1.8 % of 36 %,
on licenses -1.9 % of 12 %. On random characters the predictors do cost 60 %, and fail. One layer
of six that decides blindly costs less than that bound: it is the first check that finds it.

Shape letters: N chunks, S chunk length, T tokens, K blocks.
"""

from __future__ import annotations

from math import expm1, sqrt
from typing import NamedTuple

from torch import Tensor

from sparsecast.export.checks.base import Check
from sparsecast.export.engine.fired import Drawn, Measured, Rates
from sparsecast.export.engine.protocol import losses
from sparsecast.export.read.reader import GGUFFile
from sparsecast.predictors.manifest import PredictorManifest

KEPT = 0.5
SLACK = 0.1
ERRORS = 4.0
FLOOR = 0.002
BLOCK, SCORED_BLOCK = 32, 21
"""Tokens that count as one observation: of 128 of a chunk, and of the 63 that are scored."""
SHOWN = 4
"""Layers that are told one by one."""
ADVICE = (
    "decides otherwise than its predictor did in calibration, so it is another layer's, another "
    "model's or damaged; export again from the folder that was trained"
)


class Decisions(NamedTuple):
    """One layer on a text."""

    rates: Rates
    predicted_sparsity: float
    true_sparsity: float
    error: float
    """Standard error of `rates.informed`."""


def measure(file: GGUFFile, threshold: float, ids_NS: Tensor) -> tuple[list[Decisions], Tensor]:
    """Every layer's decisions, and the losses of the model in the file's types.

    Args:
        threshold: FATReLU's T of the model; 0 is ReLU.
    """
    emulator = Measured(file, threshold)
    own_NS = losses(emulator.logits, ids_NS)
    width, layers = emulator.header.ffn, emulator.header.layers
    return [_decisions(emulator.counts(layer), width) for layer in range(layers)], own_NS


def _decisions(counts_T3: Tensor, width: int) -> Decisions:
    tokens = len(counts_T3)
    hit, fired, through = counts_T3.sum(0).tolist()
    silent = tokens * width - fired
    recall = hit / fired if fired else 1.0
    false = (through - hit) / silent if silent else 0.0
    blocks_K3 = counts_T3[: tokens // BLOCK * BLOCK].view(-1, BLOCK, 3).sum(1)
    hit_K, fired_K, through_K = blocks_K3.unbind(1)
    silent_K = BLOCK * width - fired_K
    off_K = (hit_K - recall * fired_K) / (fired or 1.0)
    off_K = off_K - (through_K - hit_K - false * silent_K) / (silent or 1.0)
    blocks = len(off_K)
    error = sqrt(blocks / (blocks - 1) * float(off_K.square().sum()))
    share = tokens * width
    return Decisions(Rates(recall, false), 1 - through / share, 1 - fired / share, error)


def calibrated(manifest: PredictorManifest, decisions: list[Decisions]) -> list[Rates]:
    """What the manifest says of each layer; with the text's true sparsity where it has none."""
    rates = []
    for scores, found in zip(manifest.calibration, decisions, strict=True):
        silent = scores.get("true_sparsity", found.true_sparsity)
        through = 1 - scores["predicted_sparsity"]
        false = (through - scores["recall"] * (1 - silent)) / silent if silent else 0.0
        rates.append(Rates(scores["recall"], min(1.0, max(0.0, false))))
    return rates


def check_decisions(
    decisions: list[Decisions], manifest: PredictorManifest | None, tokens: int
) -> Check:
    """Each layer's decisions against its calibration; without one they are only told."""
    found = f"{_range('recall', [d.rates.recall for d in decisions])}, "
    found += _range("predicted sparsity", [d.predicted_sparsity for d in decisions])
    if manifest is None:
        return Check("decisions", True, f"{found}; no calibration to compare with")
    wrong = []
    for layer, said in enumerate(calibrated(manifest, decisions)):
        here, scores = decisions[layer], manifest.calibration[layer]
        least = min(KEPT * said.informed, said.informed - SLACK)
        least -= ERRORS * here.error * _calibration_error(manifest, tokens)
        if here.rates.informed < least:
            wrong.append(
                f"layer {layer}: recall {here.rates.recall:.3f} (calibration "
                f"{scores['recall']:.3f}), predicted sparsity {here.predicted_sparsity:.3f} "
                f"({scores['predicted_sparsity']:.3f}), apart by {here.rates.informed:.3f} "
                f"({said.informed:.3f}, expected at least {least:.3f})"
            )
    if wrong:
        more = f"; and {len(wrong) - SHOWN} more layers" if len(wrong) > SHOWN else ""
        detail = f"{'; '.join(wrong[:SHOWN])}{more}: {ADVICE}"
        return Check("decisions", False, detail)
    return Check("decisions", True, f"{found}, as calibrated")


def _calibration_error(manifest: PredictorManifest, tokens: int) -> float:
    """By how much the calibration's own sampling widens a standard error on `tokens`."""
    taken = manifest.recipe.get("calibration_tokens")
    return sqrt(1 + tokens / taken) if isinstance(taken, int) and taken > 0 else 1.0


def _range(name: str, values: list[float]) -> str:
    return f"{name} {min(values):.3f} to {max(values):.3f}"


def bound_of(
    file: GGUFFile,
    threshold: float,
    rates: list[Rates],
    ids_NS: Tensor,
    bundle_NS: Tensor,
    own_NS: Tensor,
) -> float:
    """The largest share by which the bundle's perplexity may exceed the model's.

    Args:
        bundle_NS: Losses of the bundle, as `losses` gives them.
        own_NS: Of the model, from `measure`.
    """
    drawn_NS = losses(Drawn(file, threshold, rates).logits, ids_NS)
    apart_K = (bundle_NS - drawn_NS).unfold(1, SCORED_BLOCK, SCORED_BLOCK).mean(-1).flatten()
    error = float(apart_K.std()) / sqrt(len(apart_K))
    return expm1(max(0.0, float((drawn_NS - own_NS).mean())) + ERRORS * error + FLOOR)


def check_perplexity(
    bundle_NS: Tensor,
    stored_NS: Tensor,
    own_NS: Tensor | None,
    *,
    bound: float | None,
    allowed: float | None,
) -> Check:
    """The bundle with its predictors beside the model with its own activation.

    Args:
        bundle_NS: Losses, see `protocol.losses`.
        stored_NS: Of the model in the file's types.
        own_NS: Of the model itself, where it is at hand.
        bound: What the predictors may cost by their calibration; None without one.
        allowed: What the user allows over the model itself, in place of `bound`.
    """
    name, reference_NS = "the model itself", own_NS
    if reference_NS is None:
        name, reference_NS = "the model as stored", stored_NS
    bundle, own = (float(nll_NS.mean().exp()) for nll_NS in (bundle_NS, reference_NS))
    increase = bundle / own - 1
    told = f"bundle {bundle:.4f}, {name} {own:.4f} ({increase:+.2%})"
    told += f", {len(bundle_NS) * 2 * (bundle_NS.shape[1] + 1)} held-out tokens"
    if not (bundle < float("inf") and own < float("inf")):
        return Check("perplexity", False, told)
    if allowed is not None:
        end = f"{allowed:+.2%} allowed by --max-perplexity-increase"
        return Check("perplexity", increase <= allowed, f"{told}; at most {end}")
    if bound is None:
        end = "no calibration to hold it against; see --max-perplexity-increase"
        return Check("perplexity", True, f"{told}; {end}")
    cost = expm1(float((bundle_NS - stored_NS).mean()))
    told += f"; the predictors cost {cost:+.2%}"
    if cost <= bound:
        return Check("perplexity", True, f"{told}, at most {bound:+.2%} by their calibration")
    return Check(
        "perplexity",
        False,
        f"{told}, more than {bound:+.2%}, what as many misses at random would cost by their "
        "calibration: train them for this model and such text, or set --max-perplexity-increase",
    )
