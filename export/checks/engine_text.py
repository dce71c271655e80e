"""Compare the engine's tokenization and perplexity with ours.

The engine's tokens of a text must be those of the file's tokenizer (export/read/vocab.py). Where
they are the model's too, the `perplexity` binary, which tokenizes text itself, must come to our
perplexity. Otherwise, and with any gpt2 vocabulary, the server, which accepts ids, gives the
probability of each next token, without the tokens that it cannot print; ours leaves out the same
tokens.

Shape letters: P prompts, S prompt length, V vocabulary.
"""

from __future__ import annotations

import statistics
from math import isfinite
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sparsecast.export.checks.base import Check
from sparsecast.export.engine.emulator import Emulator
from sparsecast.export.engine.process import (
    EngineError,
    Launch,
    engine_perplexity,
    serving,
)
from sparsecast.export.engine.protocol import perplexity
from sparsecast.export.engine.replies import Reply, Spelling
from sparsecast.export.read.reader import GGUFFile
from sparsecast.export.read.vocab import FileVocabulary

PERPLEXITY_BOUND = 0.005


class EnginePerplexity(NamedTuple):
    """The `engine` key of verify's JSON."""

    perplexity: float | None
    reference: float


def check_tokenization(launch: Launch, tokenizer: FileVocabulary, docs: list[str]) -> Check:
    """Compare the engine's tokens of every document with those of the file's tokenizer."""
    name = "engine tokenization"
    try:
        with serving(
            launch.build, launch.model, len(tokenizer.texts), options=launch.options
        ) as server:
            pairs = [(server.tokens(doc), tokenizer.encode(doc)) for doc in docs]
    except EngineError as error:
        return Check(name, False, str(error))
    differ = [(theirs, ours) for theirs, ours in pairs if theirs != ours]
    detail = f"{len(differ)} of {len(docs)} held-out documents differ"
    if differ:
        theirs, ours = (sum(map(len, ids)) for ids in zip(*differ, strict=True))
        detail += f", {theirs:,} tokens there and {ours:,} by the file's tokenizer"
    return Check(name, not differ, detail)


def check_engine_perplexity(
    build: Path, file: GGUFFile, emulator: Emulator, text: str, ids_NS: Tensor
) -> tuple[Check, EnginePerplexity]:
    """Compare the engine's perplexity of `text` with ours of `ids_NS`, the same chunks."""
    ours = perplexity(emulator.logits, ids_NS)
    try:
        theirs = engine_perplexity(build, file.path, text, len(ids_NS))
    except EngineError as error:
        return Check("engine perplexity", False, str(error)), EnginePerplexity(None, ours)
    vocab = len(file.keys["tokenizer.ggml.tokens"])
    return compare_perplexity([theirs], ours, vocab, f"{len(ids_NS)} chunks")


def check_perplexity_by_ids(
    launch: Launch,
    emulator: Emulator,
    spelling: Spelling,
    prompts_PS: Tensor,
    replies: list[list[Reply]],
) -> tuple[Check, EnginePerplexity]:
    """Compare the server's probabilities of each prompt's next tokens with ours.

    Args:
        replies: Replies by prompt and position.
    """
    theirs, ours = [], []
    missing: list[tuple[list[int], int, float]] = []
    for prompt, said, logits_SV in zip(
        prompts_PS.tolist(), replies, emulator.logits(prompts_PS), strict=True
    ):
        for s, target in enumerate(prompt[1:]):
            if target in spelling.excluded:
                continue
            ours.append(spelling.distribution(logits_SV[s])[target].log().item())
            if bool((said[s].slots == target).any()):
                theirs.append(said[s].probability(target).log().item())
            else:
                missing.append((prompt[: s + 1], target, ours[-1]))
    try:
        theirs += _raised(launch, spelling, missing)
    except EngineError as error:
        return Check("engine perplexity", False, str(error)), EnginePerplexity(None, _mean(ours))
    where = f"{len(ours)} positions by token ids"
    return compare_perplexity([_mean(theirs)], _mean(ours), len(spelling.texts), where)


def _mean(logs: list[float]) -> float:
    return torch.tensor(logs, dtype=torch.float64).mean().neg().exp().item()


def _raised(
    launch: Launch, spelling: Spelling, asked: list[tuple[list[int], int, float]]
) -> list[float]:
    """Ask for log probabilities of tokens that are not among the most probable.

    With b added to its logit, a token of odds o gets the odds o exp(b). Raised by minus our log
    probability, its probability becomes about a half, where the reply is precise.

    Args:
        asked: Prompt, token and our log probability of it.
    """
    if not asked:
        return []
    logs = []
    tokens = len(spelling.texts), spelling.excluded
    with serving(launch.build, launch.model, *tokens, options=launch.options) as server:
        for prompt, token, log in asked:
            said = spelling.translate(server.next(prompt, [(token, -log)])).probability(token)
            odds = said / (1 - said) * torch.tensor(log, dtype=torch.float64).exp()
            logs.append((odds / (1 + odds)).log().item())
    return logs


def compare_perplexity(
    runs: list[float], ours: float, vocab: int, where: str
) -> tuple[Check, EnginePerplexity]:
    """Compare the median of the engine's runs with ours; their range widens the bound.

    Args:
        vocab: The vocabulary's size, the perplexity of constant logits.
        where: What they were computed on.
    """
    theirs = statistics.median(runs)
    change, apart = theirs / ours - 1, (max(runs) - min(runs)) / ours
    bound = PERPLEXITY_BOUND + (apart if isfinite(apart) else 0.0)
    detail = f"engine {theirs:.4f}, ours {ours:.4f} ({change:+.4%}, bound {bound:.1%}), {where}"
    if apart:
        detail += f"; the median of {len(runs)} runs {apart:.2%} apart, which is part of the bound"
    ok = all(isfinite(run) for run in runs) and abs(change) <= bound
    if abs(theirs / vocab - 1) < 1e-6:
        ok, detail = False, detail + "; that is the vocabulary's size: constant logits"
    return Check("engine perplexity", ok, detail), EnginePerplexity(
        theirs if isfinite(theirs) else None, ours
    )
