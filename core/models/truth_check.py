"""The truth check: does the activation that a config names fit the weights?

A conversion may lose FATReLU's threshold, and a config may name another activation than the one
that the model was trained with. Neither is an error when the model is loaded. Here the model reads
the same few tokens with each plausible activation in its FFNs, and the log-likelihoods of the
tokens are compared in pairs: d is the difference of their means, and e its standard error over
blocks of `BLOCK` tokens.

    unknown                 every activation has a mean NLL above log(vocabulary) - `CHANCE`: the
                            text says nothing about this model
    wrong                   another activation is better by d > `NOISE` e and d > `MARGIN`, or
                            d > `PRICE` where the config's leaves more zeros
    threshold               the config says relu, and fatrelu(T) costs less than `MARGIN` (d + 2 e)
                            and silences at least `LEAST_SILENCED` of the neurons that fire

ProSparse (arXiv 2402.13516) shifts the threshold after training, at a small cost in perplexity, so
a model whose threshold was lost is no worse without it, only less sparse: its weights are those of
a ReLU model. That a threshold is free is therefore all that can be seen, and of two activations
that cannot be told apart by perplexity the one with more zeros is said to fit better.

Shape letters: N places of a batch, padding included, F FFN width, T tokens that are predicted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from sparsecast.core.models.activations import ActivationRule
from sparsecast.core.models.experts import expert_loops, expert_modules
from sparsecast.core.models.families import family_of
from sparsecast.core.models.loading import input_device
from sparsecast.core.text.tokens import TokenBatch

BLOCK = 32
"""Tokens of one text whose differences are taken as one observation."""
LEAST_TOKENS = 8 * BLOCK
CHANCE = 1.0
"""Nats."""
NOISE = 3.0
"""Standard errors."""
MARGIN = 0.005
"""Nats, about half a percent of perplexity: what `sparsify` lets a threshold cost by default."""
PRICE = 0.02
"""Nats that more zeros may cost."""
LEAST_SILENCED = 0.05
"""ProSparse's own thresholds silence 7 to 12 % of the neurons that fire."""
PUBLISHED_THRESHOLDS = (0.01, 0.03)
"""ProSparse-7B and -13B, and MiniCPM-S-1B."""
THRESHOLDS = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1)
"""Published ones and what lies between and beyond."""


@dataclass(frozen=True)
class Candidate:
    """An activation to try."""

    name: str
    act: nn.Module
    """Of the gate, or of the first projection if there is no gate."""
    on_up: bool = False
    """Whether up passes through ReLU as well."""
    threshold: float | None = None
    """T of FATReLU."""

    @classmethod
    def of(cls, rule: ActivationRule) -> Candidate:
        threshold = rule.threshold if rule.name == "fatrelu" else None
        return cls(str(rule), rule.module(), rule.on_up, threshold)


def candidates(
    configured: ActivationRule | str, *, gated: bool, thresholds: Iterable[float] = THRESHOLDS
) -> list[Candidate]:
    """List the activations to compare, the configured one first.

    Args:
        configured: A rule, or the name of one that leaves no zeros, as transformers knows it.
        gated: Whether the FFN has a gate. Published models with FATReLU and dReLU do.
        thresholds: Of FATReLU.
    """
    if isinstance(configured, ActivationRule):
        first = Candidate.of(configured)
    else:
        first = Candidate(configured, ACT2FN[configured])
    smooth = "silu" if gated else "gelu"
    found = [first, Candidate(smooth, ACT2FN[smooth])]
    names = ("relu", "relu2", "drelu") if gated else ("relu", "relu2")
    found += [Candidate.of(ActivationRule(name)) for name in names]
    if gated:
        found += [Candidate.of(ActivationRule("fatrelu", t)) for t in thresholds]
    return list({candidate.name: candidate for candidate in found}.values())


def fits_in(model: PreTrainedModel) -> bool:
    """Return whether every layer has the family's submodules."""
    family = family_of(model.config, "model")
    found = (family.experts,) if family.experts else (family.gate, family.up, family.x1_reader)
    paths = [path for path in found if path is not None]
    layers = family.decoder_layers(model)
    return all(isinstance(_find(layer, path), nn.Module) for layer in layers for path in paths)


def _find(layer: nn.Module, path: str) -> nn.Module | None:
    try:
        return layer.get_submodule(path)
    except AttributeError:
        return None


@dataclass(frozen=True)
class Score:
    """What one activation makes of the tokens."""

    candidate: Candidate
    nll_T: Tensor
    """float64 on the CPU, every token but each document's first."""
    zeros: list[float]
    """Share of zeros in x1, per layer, over every token."""

    @property
    def nll(self) -> float:
        """The mean, infinite if the activation overflows."""
        mean = self.nll_T.mean().item()
        return mean if math.isfinite(mean) else math.inf

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll) if self.nll < 700 else math.inf

    @property
    def active(self) -> float:
        """Share of x1 that is not zero, the plain mean over layers."""
        return 1 - sum(self.zeros) / len(self.zeros)

    def difference(self, other: Score) -> tuple[float, float]:
        """Return (mean of this NLL minus the other's, its standard error)."""
        if not math.isfinite(self.nll) or not math.isfinite(other.nll):
            return (0.0 if self.nll == other.nll else self.nll - other.nll), 0.0
        diff_T = self.nll_T - other.nll_T
        blocks = diff_T[: len(diff_T) // BLOCK * BLOCK].view(-1, BLOCK).mean(1)
        return diff_T.mean().item(), (blocks.std() / math.sqrt(len(blocks))).item()


@torch.inference_mode()
def score(model: PreTrainedModel, batches: list[TokenBatch], candidate: Candidate) -> Score:
    """Read the batches with `candidate` in every FFN; the model is as before afterwards.

    Zeros of a mixture are shares of x1 of the experts that were chosen. Memory: one batch's logits,
    and one layer's gate and up.
    """
    layers = family_of(model.config, "model").decoder_layers(model)
    zeros, total = [0] * len(layers), [0] * len(layers)
    nll: list[Tensor] = []
    kept_N = torch.zeros(0, dtype=torch.bool)

    def count(layer: int, x1_TF: Tensor, place_T: Tensor | None = None) -> None:
        kept_T = kept_N.to(x1_TF.device)
        x1_TF = x1_TF[kept_T if place_T is None else kept_T[place_T]]
        zeros[layer] += int((x1_TF == 0).sum())
        total[layer] += x1_TF.numel()

    with activation_replaced(model, candidate, count):
        for batch in batches:
            kept_N = batch.keep_BS.flatten()
            # Right padding: causal attention needs no mask to keep it out of real tokens.
            logits = model(batch.to(input_device(model)).ids_BS, use_cache=False).logits
            for row_SV, ids_S, keep_S in zip(logits, batch.ids_BS, batch.keep_BS, strict=True):
                length = int(keep_S.sum())
                target = ids_S[1:length].to(row_SV.device)
                loss = nn.functional.cross_entropy(
                    row_SV[: length - 1].float(), target, reduction="none"
                )
                nll.append(loss.double().cpu())
    shares = [number / of for number, of in zip(zeros, total, strict=True)]
    return Score(candidate, torch.cat(nll), shares)


@contextmanager
def activation_replaced(
    model: PreTrainedModel, candidate: Candidate, count: Callable[..., object]
) -> Iterator[None]:
    """Compute x1 with `candidate` in place of the model's own activation, for a block.

    Hooks take gate and up before anything else sees them, so that an activation which the model has
    already got, dReLU's hook included, does not count.

    Args:
        count: Called with (layer, x1 (N, F)), and for an expert with its tokens' places as well.
    """
    family = family_of(model.config, "model")
    if family.experts is not None:
        with _replaced_in_experts(model, candidate, count):
            yield
        return
    held: dict[str, Tensor] = {}

    def hold(name: str, _module: nn.Module, _args: object, output: Tensor) -> None:
        held[name] = output

    def replace(layer: int, _module: nn.Module, _args: object) -> tuple[Tensor]:
        up = held.pop("up")
        if family.gate is None:
            x1 = candidate.act(up)
        else:
            x1 = candidate.act(held.pop("gate")) * (up.relu() if candidate.on_up else up)
        count(layer, x1.reshape(-1, x1.shape[-1]))
        return (x1,)

    handles: list[Any] = []
    try:
        for number, layer in enumerate(family.decoder_layers(model)):
            for name, path in (("gate", family.gate), ("up", family.up)):
                if path is not None:
                    module = layer.get_submodule(path)
                    handles.append(module.register_forward_hook(partial(hold, name), prepend=True))
            reader = layer.get_submodule(family.x1_reader)
            handles.append(reader.register_forward_pre_hook(partial(replace, number), prepend=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _replaced_in_experts(
    model: PreTrainedModel, candidate: Candidate, count: Callable[..., object]
) -> Iterator[None]:
    def see(layer: int, _expert: int, token_T: Tensor, _slot: Tensor, x1_TF: Tensor) -> Tensor:
        count(layer, x1_TF, token_T)
        return x1_TF

    modules: list[Any] = expert_modules(model)
    loops = expert_loops(model)
    before = [
        (module.act_fn, loop.relu_up, loop.on_x1)
        for module, loop in zip(modules, loops, strict=True)
    ]
    try:
        for number, (module, loop) in enumerate(zip(modules, loops, strict=True)):
            module.act_fn, loop.relu_up = candidate.act, candidate.on_up
            loop.on_x1 = partial(see, number)
        yield
    finally:
        for module, loop, kept in zip(modules, loops, before, strict=True):
            module.act_fn, loop.relu_up, loop.on_x1 = kept


@dataclass(frozen=True)
class Verdict:
    """What the scores say of the configured activation."""

    kind: str
    """fits, wrong, threshold or unknown."""
    best: str | None
    """The activation that fits better; None if the configured one fits or nothing can be told."""
    text: str
    """One sentence."""


@dataclass(frozen=True)
class TruthCheck:
    """The scores of one check, the configured activation's first."""

    scores: list[Score]
    says: str
    """Who names the activation: the config, or an option."""
    vocabulary: int
    """Rows of the model's embedding."""

    @property
    def configured(self) -> Score:
        return self.scores[0]

    @property
    def tokens(self) -> int:
        """Tokens that were predicted."""
        return len(self.configured.nll_T)

    @property
    def verdict(self) -> Verdict:
        """Judge by the rules at the head of this module."""
        own, best = self.configured, min(self.scores, key=lambda score: score.nll)
        name = own.candidate.name
        if self.tokens < LEAST_TOKENS:
            return Verdict(
                "unknown",
                None,
                f"cannot tell whether {name} fits: {self.tokens:,} tokens are too few, at least "
                f"{LEAST_TOKENS} are needed",
            )
        if math.isinf(best.nll):
            text = "the model overflows with every activation; check its weights and --dtype"
            return Verdict("unknown", None, f"cannot tell whether {name} fits: {text}")
        if best.nll > math.log(self.vocabulary) - CHANCE:
            return Verdict(
                "unknown",
                None,
                f"cannot tell whether {name} fits: with every activation the model predicts this "
                f"text no better than chance, the best with perplexity {best.perplexity:.4g}",
            )
        better = self._better()
        found = own if better is None else better
        free = self._free_threshold(found) if found.candidate.name == "relu" else None
        if better is not None:
            kind = better.candidate.name
            text = f"{self.says} says {name}; {kind} fits better: {_pair(better, own)}"
            if free is not None:
                text += (
                    f"; {free.candidate.name} fits as well, {free.perplexity:.4g}, and "
                    f"{_silenced(free, found)}"
                )
            return Verdict("wrong", kind, text)
        if free is not None:
            return Verdict(
                "threshold",
                free.candidate.name,
                f"{self.says} says {name}; {free.candidate.name} fits better: "
                f"{_silenced(free, own)} at no loss, {_pair(free, own)}; a model made with a "
                f"threshold needs --activation-threshold {free.candidate.threshold:g}",
            )
        return Verdict("fits", None, f"{self.says} says {name}, and it fits: {_perplexity(own)}")

    def _better(self) -> Score | None:
        """Find the best activation among those that are better than the configured one."""
        own, found = self.configured, []
        for other in self.scores[1:]:
            gain, error = own.difference(other)
            margin = PRICE if own.active < other.active else MARGIN
            if gain > max(margin, NOISE * error):
                found.append(other)
        if not found:
            return None
        kinds = [each for each in found if not each.candidate.threshold]
        # Small thresholds are as good as relu wherever relu is: they are named beside it.
        return min(kinds or found, key=lambda score: score.nll)

    def _free_threshold(self, relu: Score) -> Score | None:
        """Find the largest threshold that costs nothing against `relu` and silences enough."""
        found = []
        for other in self.scores:
            cost, error = other.difference(relu)
            silenced = 1 - other.active / relu.active if relu.active else 0.0
            if other.candidate.threshold and cost + 2 * error < MARGIN:
                found += [other] if silenced >= LEAST_SILENCED else []
        return max(found, key=lambda score: score.candidate.threshold or 0.0, default=None)


def check_activation(
    model: PreTrainedModel,
    batches: list[TokenBatch],
    tried: list[Candidate],
    *,
    vocabulary: int,
    says: str = "config",
    on_pass: Callable[[], object] = lambda: None,
) -> TruthCheck:
    """Score every candidate; thresholds only if another activation does better than chance.

    Args:
        tried: See `candidates`; the configured one first.
        on_pass: Called before each pass over the batches; may raise.
    """
    scores: list[Score] = []
    for candidate in sorted(tried[1:], key=lambda each: each.threshold is not None):
        if not scores:
            on_pass()
            scores.append(score(model, batches, tried[0]))
        best = min(each.nll for each in scores)
        if candidate.threshold and best > math.log(vocabulary) - CHANCE:
            break
        on_pass()
        scores.append(score(model, batches, candidate))
    return TruthCheck(scores, says, vocabulary)


def _perplexity(score: Score) -> str:
    return f"perplexity {score.perplexity:.4g}, {1 - score.active:.1%} zeros"


def _pair(better: Score, worse: Score) -> str:
    return f"perplexity {better.perplexity:.4g} against {worse.perplexity:.4g}"


def _silenced(sparse: Score, dense: Score) -> str:
    return f"{1 - sparse.active / dense.active:.0%} fewer neurons fire"
