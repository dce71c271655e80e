"""Compare the engine's next tokens with our evaluation of the same file.

Both compute the same arithmetic but sum in different orders. A difference of 1e-7 can flip a
rounding to f16 or q8_0, and that can flip a predictor's decision at the threshold. How far this
moves probabilities depends on the model and the formats, and a single evaluation of ours says
little about it: a few positions have most of the effect. So the file is evaluated `EVALUATIONS`
times with products perturbed by their last bits (export/engine/perturbed.py), and the engine must
look like one more such evaluation:
- at the median of positions and pairs, its distance from our evaluations is at most `FACTOR` times
  their distance from each other;
- at 90 % of positions, our nearest evaluation is at most `FACTOR` times as far from it as from the
  nearest other one. A flip that only the engine has shows from its position to the end of the
  prompt, so the last 10 % say little;
- its token is the argmax of one of our evaluations or within `LOGIT_BOUND` of it, except for a few
  near ties. Other prompts are evaluated again, up to `MOST` times.
Measured with everything in q4_0, 512 positions: on tiny-prosparse the engine is 0.92 times as far
from our evaluations as they are from each other, 3.5e-3 against 3.8e-3 at the median; on a random
model of 3 layers 0.3 times. An evaluation that rounds inputs to f16 instead of q8_0 is 43 and 63
times as far, one that leaves the scales of inputs in float32 2.1 and 4.1 times.

With several threads, as in runs of a GPU build (engine_gpu.py), the engine's own runs differ. Then
it is asked several times: of each position its run nearest to each evaluation counts, and the
distance between its runs is added to the bounds of the probabilities.

Shape letters: N evaluations, P prompts, S prompt length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sparsecast.export.checks.base import Check
from sparsecast.export.checks.engine_text import (
    EnginePerplexity,
    check_engine_perplexity,
    check_perplexity_by_ids,
    check_tokenization,
)
from sparsecast.export.checks.logits import degenerate
from sparsecast.export.engine.emulator import Emulator
from sparsecast.export.engine.perturbed import Decision, Perturbed, closest_decisions
from sparsecast.export.engine.process import EngineError, Launch, serving
from sparsecast.export.engine.protocol import HeldOutText, joined
from sparsecast.export.engine.replies import Reply, Spelling
from sparsecast.export.read.reader import GGUFFile

EVALUATIONS, MOST = 8, 24
LOGIT_BOUND = 1e-2
"""Largest distance of the engine's token below our argmax, in logits."""
MOVED_SHARE = 0.01
"""Share of positions allowed beyond that bound, within the spread of our own evaluations."""
FACTOR = 2.0
MEDIAN_FLOOR, NEAREST_FLOOR = 1e-4, 1e-3
"""Distances of a probability that always pass."""
PROMPTS, PROMPT_LENGTH = 8, 64
NEAR, OUTLIERS = 1e-3, 3
"""Distance of a probability beyond which positions are listed, and how many are."""
Evaluate = Callable[[GGUFFile, int], Emulator]


def check_engine(
    build: Path, emulator: Emulator, text: HeldOutText
) -> tuple[list[Check], EnginePerplexity | None]:
    """Compare tokenization, perplexity and next tokens with the engine's.

    Returns:
        The checks, and both perplexities where the engine was asked for one.
    """
    file, (tokenizer, docs, ids_NS, by_ids) = emulator.file, text
    launch = Launch(build, file.path)
    checks = [check_tokenization(launch, tokenizer, docs)]
    numbers = None
    if not by_ids:
        overall, numbers = check_engine_perplexity(build, file, emulator, joined(docs), ids_NS)
        checks.append(overall)
    spelling = Spelling(tokenizer.texts, tokenizer.excluded)
    prompts_PS = prompts_of(ids_NS, PROMPTS, PROMPT_LENGTH)
    if reason := degenerate(emulator.logits(prompts_PS)):
        return [*checks, Check("engine tokens", False, f"ours: {reason}")], numbers
    try:
        replies = replies_to(launch, spelling, prompts_PS)
    except EngineError as error:
        return [*checks, Check("engine tokens", False, str(error))], numbers
    if by_ids:
        overall, numbers = check_perplexity_by_ids(launch, emulator, spelling, prompts_PS, replies)
        checks.append(overall)
    return [*checks, *check_next_tokens(file, spelling, prompts_PS, [replies])], numbers


def prompts_of(ids_NS: Tensor, most: int, length: int) -> Tensor:
    """Return the beginnings of at most `most` chunks from all over the text, (P, length)."""
    rows = torch.linspace(0, len(ids_NS) - 1, min(most, len(ids_NS))).long()
    return ids_NS[rows, :length]


def replies_to(launch: Launch, spelling: Spelling, prompts_PS: Tensor) -> list[list[Reply]]:
    """Ask the engine for its distributions after every prefix of every prompt.

    Raises:
        EngineError: The server did not start or gave no answer.
    """
    tokens = len(spelling.texts), spelling.excluded, spelling.unsayable
    with serving(launch.build, launch.model, *tokens, options=launch.options) as server:
        return [
            [spelling.translate(server.next(prompt[: s + 1])) for s in range(len(prompt))]
            for prompt in prompts_PS.tolist()
        ]


def check_next_tokens(
    file: GGUFFile,
    spelling: Spelling,
    prompts_PS: Tensor,
    runs: list[list[list[Reply]]],
    evaluate: Evaluate = Perturbed,
    factor: float = FACTOR,
    moved_share: float = MOVED_SHARE,
) -> list[Check]:
    """Compare next-token distributions after every prefix of the prompts, teacher-forced.

    Args:
        runs: The engine's replies by run, prompt and position.
        evaluate: Makes an evaluation of the file with a seed.
        factor: How many times as far from ours as ours from each other the engine may be.
        moved_share: Share of tokens that may differ where our own sums decide.
    """
    logits_NPSV = [evaluate(file, seed).logits(prompts_PS) for seed in range(EVALUATIONS)]
    positions = []
    for p, prompt_S in enumerate(prompts_PS):
        logits_NSV = torch.stack([logits_PSV[p] for logits_PSV in logits_NPSV])
        again = partial(_evaluated, file, evaluate, prompt_S)
        positions += _positions(spelling, [run[p] for run in runs], logits_NSV, again)
    closest = closest_decisions(file, prompts_PS)
    outliers = outlier_check(positions, closest, prompts_PS.shape[1])
    tokens = tokens_check(positions, moved_share)
    return [tokens, probability_check(positions, factor), outliers]


def _evaluated(file: GGUFFile, evaluate: Evaluate, prompt_S: Tensor, seed: int) -> Tensor:
    """Evaluate one prompt, (S, V)."""
    return evaluate(file, seed).logits(prompt_S[None])[0]


def _positions(
    spelling: Spelling,
    runs: list[list[Reply]],
    logits_NSV: Tensor,
    again: Callable[[int], Tensor],
) -> list[Position]:
    """Compare one prompt; evaluate it again while one of its tokens is far from ours.

    Args:
        runs: Replies by run and position.
    """
    replies = list(zip(*runs, strict=True))
    found = [
        position(spelling, said, logits_NV)
        for said, logits_NV in zip(replies, logits_NSV.unbind(1), strict=True)
    ]
    low_SV, high_SV = logits_NSV.amin(0), logits_NSV.amax(0)
    for seed in range(EVALUATIONS, MOST):
        if all(place.gap <= LOGIT_BOUND for place in found):
            break
        logits_SV = again(seed)
        low_SV, high_SV = low_SV.minimum(logits_SV), high_SV.maximum(logits_SV)
        moved = (high_SV - low_SV).amax(-1).tolist()
        gaps = [
            min(spelling.compare(reply, logits_V)[0] for reply in said)
            for said, logits_V in zip(replies, logits_SV, strict=True)
        ]
        found = [
            place._replace(gap=min(place.gap, gap), moved=far)
            for place, gap, far in zip(found, gaps, moved, strict=True)
        ]
    return found


class Position(NamedTuple):
    """The engine and our evaluations at one position."""

    gap: float
    """Distance of the engine's token below our argmax, in logits, in the nearest evaluation."""
    moved: float
    """Largest spread of a logit over our evaluations."""
    theirs: list[float]
    """Largest difference of a probability between each evaluation and the engine's nearest run."""
    ours: list[float]
    """The same between each evaluation and every other one, row by row."""
    spread: float = 0.0
    """The same between two runs of the engine."""

    @property
    def nearest(self) -> list[float]:
        """The same between each evaluation and the nearest other one."""
        others = len(self.theirs) - 1
        return [min(self.ours[k : k + others]) for k in range(0, len(self.ours), others)]


def position(spelling: Spelling, said: Sequence[Reply], logits_NV: Tensor) -> Position:
    """Compare the replies of one or more runs with our logits at their position."""
    probs_NV = torch.stack([spelling.distribution(logits_V) for logits_V in logits_NV])
    compared = [
        [spelling.compare(reply, *ours) for reply in said]
        for ours in zip(logits_NV, probs_NV, strict=True)
    ]
    apart_NN = torch.stack([(probs_NV - probs_V).abs().amax(-1) for probs_V in probs_NV])
    other_NN = ~torch.eye(len(probs_NV), dtype=torch.bool)
    return Position(
        gap=min(gap for of_run in compared for gap, _ in of_run),
        moved=(logits_NV.amax(0) - logits_NV.amin(0)).max().item(),
        theirs=[min(distance for _, distance in of_run) for of_run in compared],
        ours=apart_NN[other_NN].tolist(),
        spread=max((a.distance(b) for a, b in combinations(said, 2)), default=0.0),
    )


def tokens_check(positions: list[Position], moved_share: float = MOVED_SHARE) -> Check:
    """Check that the engine's tokens are ours or near ties."""
    n = len(positions)
    agree = sum(p.gap == 0 for p in positions)
    far = [p for p in positions if p.gap > LOGIT_BOUND]
    wrong = [p for p in far if p.gap > p.moved]
    detail = (
        f"{n} positions: {agree} engine tokens are the argmax of one of our evaluations, "
        f"{n - agree - len(far)} within {LOGIT_BOUND:g} of its logit, {len(far)} further"
    )
    if far:
        detail += (
            f" (by up to {max(p.gap for p in far):.3g}; {len(far) - len(wrong)} of them by less "
            "than another order of sums moves our own logits there, allowed at "
            f"{moved_share:.0%})"
        )
    return Check("engine tokens", not wrong and len(far) <= moved_share * n, detail)


def probability_check(positions: list[Position], factor: float = FACTOR) -> Check:
    """Check that the engine is at most `factor` times as far from ours as ours from each other."""
    theirs = _quantile([p.theirs for p in positions], 0.5)
    ours = _quantile([p.ours for p in positions], 0.5)
    nearest = _quantile([[min(p.theirs)] for p in positions], 0.9)
    own_nearest = _quantile([p.nearest for p in positions], 0.9)
    apart, far_apart = (_quantile([[p.spread] for p in positions], q) for q in (0.5, 0.9))
    bound = max(MEDIAN_FLOOR, factor * ours) + apart
    nearest_bound = max(NEAREST_FLOOR, factor * own_nearest) + far_apart
    detail = (
        f"largest difference of a probability from {EVALUATIONS} evaluations of ours: median "
        f"{theirs:.2e} (ours from each other {ours:.2e}, bound {bound:.2e}), from the nearest at "
        f"90 % of positions {nearest:.2e} (ours {own_nearest:.2e}, bound {nearest_bound:.2e})"
    )
    if far_apart:
        detail += (
            f"; the engine's own runs differ by {apart:.2e} at the median and {far_apart:.2e} at "
            "90 %, which is part of the bounds"
        )
    return Check("engine probabilities", theirs <= bound and nearest <= nearest_bound, detail)


def outlier_check(
    positions: list[Position], decisions: list[Decision], length: int = PROMPT_LENGTH
) -> Check:
    """List where the engine is far from all our evaluations, and which decision may have flipped.

    The check never fails: `probability_check` judges.

    Args:
        decisions: For each position, the decision nearest to the threshold that it depends on.
        length: Tokens of a prompt.
    """
    far = [(min(place.theirs), i) for i, place in enumerate(positions) if min(place.theirs) > NEAR]
    listed = [
        f"prompt {i // length} position {i % length} by {away:.1e}, {decisions[i]}"
        for away, i in sorted(far, reverse=True)[:OUTLIERS]
    ]
    detail = f"{len(positions) - len(far)} of {len(positions)} positions within {NEAR:g} of ours"
    if far:
        detail += (
            "; furthest, with the decision nearest to the threshold up to there: "
            + "; ".join(listed)
        )
    return Check("engine outliers", True, detail)


def _quantile(distances: list[list[float]], share: float) -> float:
    return torch.tensor(distances, dtype=torch.float64).flatten().quantile(share).item()
