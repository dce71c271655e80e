"""Measure perplexity and sparsity of a model, and choose its FATReLU threshold.

Shape letters: N places of a batch, padding included, F FFN width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsecast.core.models.activations import ActivationRule
from sparsecast.core.models.families import family_of
from sparsecast.core.models.loading import set_activation
from sparsecast.core.models.perplexity import perplexity
from sparsecast.core.models.recorder import Recorder
from sparsecast.core.progress import progress_bar
from sparsecast.core.text.tokens import TokenBatch


@dataclass(frozen=True)
class Score:
    """Perplexity, sparsity and dead neurons of a model on given text."""

    perplexity: float
    """Infinite or NaN if training has destroyed the model."""
    sparsity: float
    """Share of zeros in x1, the plain mean over layers."""
    layer_sparsity: tuple[float, ...]
    """Share of zeros in each layer's x1."""
    dead_neurons: tuple[int, ...]
    """Per layer, the neurons that fire for no token of the text."""


def score(model: PreTrainedModel, batches: Sequence[TokenBatch]) -> Score:
    """Measure perplexity, and sparsity and dead neurons over every token that is not padding."""
    fired: dict[int, Tensor] = {}  # layer to (F,) int64: tokens on which each neuron fired
    kept_N1 = torch.zeros(0)

    def keep(batch: TokenBatch) -> None:
        nonlocal kept_N1
        kept_N1 = batch.keep_BS.flatten()[:, None]

    def count(layer: int, _: Tensor, x1_NF: Tensor) -> None:
        fired_F = ((x1_NF != 0) & kept_N1).sum(0)
        fired[layer] = fired_F + fired.get(layer, 0)

    with Recorder(model, count):
        try:
            value = perplexity(model, batches, keep)
        except OverflowError:  # in exp
            value = float("inf")
    tokens = sum(batch.tokens for batch in batches)
    layers = tuple(1 - fired_F.sum().item() / (len(fired_F) * tokens) for fired_F in fired.values())
    dead = tuple(int((fired_F == 0).sum()) for fired_F in fired.values())
    return Score(value, sum(layers) / len(layers), layers, dead)


def gate_quantiles(model: PreTrainedModel, batch: TokenBatch, shares: Tensor) -> Tensor:
    """Compute quantiles of the positive gate activations of all layers.

    The result depends only on the model and the batch, not on the global random state.
    """
    family = family_of(model.config, "model")
    found: list[Tensor] = []
    handles = [
        layer.get_submodule(family.act).register_forward_hook(
            lambda _m, _a, out: found.append(out.detach().float().flatten())
        )
        for layer in family.decoder_layers(model)
    ]
    with torch.inference_mode():
        model.base_model(batch.ids_BS[:4].to(model.device), use_cache=False)
    for handle in handles:
        handle.remove()
    values = torch.cat([v[v > 0].cpu() for v in found])
    if not len(values):
        return values
    keep = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))[:1_000_000]
    return torch.quantile(values[keep], shares)


def sweep(
    model: PreTrainedModel, batches: Sequence[TokenBatch], tolerance: float
) -> tuple[float, list[tuple[float, Score]]]:
    """Choose the largest FATReLU threshold whose perplexity stays within `tolerance`.

    The candidates are 0 and quantiles of the positive gate activations. The model keeps the chosen
    activation.

    Returns:
        The threshold, and (threshold, score) of every candidate.
    """
    shares = torch.tensor([0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6])
    candidates = [0.0, *gate_quantiles(model, batches[0], shares).tolist()]
    tried: list[tuple[float, Score]] = []
    with progress_bar("threshold sweep", len(candidates)) as progress:
        for threshold in candidates:
            set_activation(model, ActivationRule("fatrelu", threshold))
            tried.append((threshold, score(model, batches)))
            progress.advance()
    bound = tried[0][1].perplexity * (1 + tolerance)
    chosen = max(t for t, s in tried if s.perplexity <= bound)
    set_activation(model, ActivationRule("fatrelu", chosen))
    return chosen, tried
