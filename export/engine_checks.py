"""The engine's binaries against our evaluation of the same file.

Both compute the same arithmetic, but sum in another order; a difference of 1e-7 can turn a
rounding to f16 or q8_0 over, and that a predictor's decision at the threshold. How far that moves
probabilities depends on the model and the format, so our own evaluation is made a second time with
sums in float64. The engine's token must be the choice of one of the two, but for a few near ties.
At 99 % of positions the engine may be 3 times as far from ours as the two are from each other, or
1e-3 where that is more; the worst position, where a strong neuron may have turned over in one
alone, is bounded loosely. (On tiny-prosparse with predictors in f16, float64 moved ours by 0.0036
and the engine was 0.0032 away; in q4_0 by 0.021, and 0.026.)

Shape letters: P prompts, S prompt length, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import count
from math import isfinite
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sparsecast.export.checks import Check
from sparsecast.export.emulate import Emulator
from sparsecast.export.engine import EngineError, Next, engine_perplexity, serving
from sparsecast.export.numerics import degenerate
from sparsecast.export.protocol import perplexity
from sparsecast.export.reader import GGUFFile

PERPLEXITY_BOUND = 0.005
LOGIT_BOUND = 1e-2
"""An engine token that is not our argmax, with sums of either width, may be this far below it."""
MOVED_SHARE = 0.01
"""Of positions, may be further below, but not than the width of sums moves our own logits there:
inputs rounded to q8_0 turn a difference of 1e-7 into one of a whole code."""
PROBABILITY_BOUND = 1e-3
PROBABILITY_FACTOR = 3.0
WORST_BOUND = 0.1
PROMPTS, PROMPT_LENGTH = 8, 64
NORMAL, UNKNOWN, BYTE = 1, 2, 6


class EnginePerplexity(NamedTuple):
    """The `engine` key of verify's JSON."""

    perplexity: float | None
    reference: float


def check_engine_perplexity(
    build: Path, file: GGUFFile, emulator: Emulator, text: str, ids_NS: Tensor
) -> tuple[Check, EnginePerplexity]:
    """`perplexity` on `text` against ours on `ids_NS`, the same chunks."""
    ours = perplexity(emulator.logits, ids_NS)
    try:
        theirs = engine_perplexity(build, file.path, text, len(ids_NS))
    except EngineError as error:
        return Check("engine perplexity", False, str(error)), EnginePerplexity(None, ours)
    change = theirs / ours - 1
    detail = (
        f"engine {theirs:.4f}, ours {ours:.4f} ({change:+.4%}, bound {PERPLEXITY_BOUND:.1%}), "
        f"{len(ids_NS)} chunks"
    )
    ok = isfinite(theirs) and abs(change) <= PERPLEXITY_BOUND
    if abs(theirs / len(file.keys["tokenizer.ggml.tokens"]) - 1) < 1e-6:
        ok, detail = False, detail + "; that is the vocabulary's size: constant logits"
    return Check("engine perplexity", ok, detail), EnginePerplexity(
        theirs if isfinite(theirs) else None, ours
    )


def check_next_tokens(
    build: Path, file: GGUFFile, emulator: Emulator, ids_NS: Tensor
) -> list[Check]:
    """Next-token distributions after every prefix of 8 prompts of 64 tokens, teacher-forced."""
    rows = torch.linspace(0, len(ids_NS) - 1, min(PROMPTS, len(ids_NS))).long()
    prompts_PS = ids_NS[rows, :PROMPT_LENGTH]
    logits_PSV = emulator.logits(prompts_PS)
    if reason := degenerate(logits_PSV):
        return [Check("engine tokens", False, f"ours: {reason}")]
    texts = texts_of(file)
    others_PSV = Emulator(file, sums=torch.float64).logits(prompts_PS)
    noise = _noise(logits_PSV, others_PSV)
    for values_PSV in (logits_PSV, others_PSV):
        values_PSV[..., file.keys.get("tokenizer.ggml.eos_token_id", 2)] = float("-inf")
    unsayable = [i for i, text in enumerate(texts) if not text or text.startswith("byte: \\x")]
    gaps, worst = [], []
    moved_PS = (logits_PSV - others_PSV).nan_to_num().abs().amax(-1)
    try:
        with serving(build, file.path, len(texts), unsayable) as server:
            for p, s in _places(prompts_PS):
                reply = server.next(prompts_PS[p, : s + 1].tolist())
                gap, distance = compare(reply, logits_PSV[p, s], texts, unsayable)
                other, _ = compare(reply, others_PSV[p, s], texts, unsayable)
                gaps.append((min(gap, other), moved_PS[p, s].item()))
                worst.append(distance)
    except EngineError as error:
        return [Check("engine tokens", False, str(error))]
    return [_tokens_check(gaps), _probability_check(worst, noise)]


def _places(prompts_PS: Tensor) -> Iterator[tuple[int, int]]:
    n_prompts, length = prompts_PS.shape
    yield from ((p, s) for p in range(n_prompts) for s in range(length))


def _tokens_check(gaps: list[tuple[float, float]]) -> Check:
    """From how far below our best the engine's token is, and how far sums move logits there."""
    agree = sum(gap == 0 for gap, _ in gaps)
    far = [(gap, moved) for gap, moved in gaps if gap > LOGIT_BOUND]
    wrong = [gap for gap, moved in far if gap > moved]
    detail = (
        f"{len(gaps)} positions: {agree} engine tokens are our argmax, "
        f"{len(gaps) - agree - len(far)} within {LOGIT_BOUND:g} of its logit, {len(far)} further"
    )
    if far:
        detail += (
            f" (by up to {max(far)[0]:.3g}; {len(far) - len(wrong)} of them by less than another "
            f"order of sums moves our own logits there, allowed at {MOVED_SHARE:.0%})"
        )
    return Check("engine tokens", not wrong and len(far) <= MOVED_SHARE * len(gaps), detail)


def _noise(one_PSV: Tensor, other_PSV: Tensor) -> float:
    """What 99 % of positions stay below: the largest difference of a probability."""
    diff_PSV = one_PSV.double().softmax(-1) - other_PSV.double().softmax(-1)
    return diff_PSV.abs().amax(-1).flatten().quantile(0.99).item()


def _probability_check(worst: list[float], noise: float) -> Check:
    bound = max(PROBABILITY_BOUND, PROBABILITY_FACTOR * noise)
    tight = torch.tensor(worst, dtype=torch.float64).quantile(0.99).item()
    ok = tight <= bound and max(worst) <= WORST_BOUND
    detail = (
        f"largest difference of a probability {max(worst):.2e} (bound {WORST_BOUND:g}), at 99 % of "
        f"positions at most {tight:.2e} (bound {bound:.2g}; our own float64 sums: {noise:.2e})"
    )
    return Check("engine probabilities", ok, detail)


def compare(
    reply: Next, logits_V: Tensor, texts: list[str], unsayable: list[int]
) -> tuple[float, float]:
    """(how far our logit of the engine's token is below our best, largest probability difference).

    The engine names tokens by text, and several may share one: the k-th of a text in its list is
    taken for our k-th of that text.
    """
    best = logits_V.max().item()
    if reply.banned:
        gap = best - logits_V[unsayable].max().item()
        logits_V = logits_V.index_fill(0, torch.tensor(unsayable), float("-inf"))
    else:
        same_text = [i for i, text in enumerate(texts) if text == reply.token]
        gap = best - max((logits_V[i].item() for i in same_text), default=float("-inf"))
    probs_V = logits_V.double().softmax(-1)
    ours: dict[str, list[float]] = defaultdict(list)
    for i in probs_V.argsort(descending=True).tolist():
        ours[texts[i]].append(probs_V[i].item())
    seen: dict[str, Iterator[int]] = defaultdict(count)
    largest = 0.0
    for text, prob in reply.probs:
        mine, k = ours.get(text, []), next(seen[text])
        largest = max(largest, abs(prob - mine[k]) if k < len(mine) else 1.0)
    return gap, largest


def texts_of(file: GGUFFile) -> list[str]:
    """What the server prints for each token (llama_token_to_piece and the server's format)."""
    tokens, types = (file.keys[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type"))
    texts = []
    for token, kind in zip(tokens, types, strict=True):
        if kind == NORMAL:
            text = token.replace("\u2581", " ")
        elif kind == BYTE:
            byte = int(token[3:5], 16)
            text = chr(byte) if byte < 128 else f"byte: \\x{byte:x}"
        else:
            text = "\u2585" if kind == UNKNOWN else ""
        texts.append(text)
    return texts
