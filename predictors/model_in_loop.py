"""Run a transformers model with sparse FFNs: with predictors in the loop, or exactly.

Shape letters: B batch, S sequence, T tokens, D hidden, F FFN width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsecast.core.models.bitnet import effective_input, effective_weight
from sparsecast.core.models.families import Family, activation_rule, family_of
from sparsecast.predictors.checkpoint import PredictorSet
from sparsecast.predictors.experts_in_loop import exact_experts_in_loop, expert_predictors_in_loop


class Rule(Protocol):
    """Says which neurons of one layer are computed: those whose logits reach a threshold."""

    def to(self, device: torch.device) -> Rule: ...

    def logits(self, x_TD: Tensor) -> Tensor:
        """Logits (..., F) for raw inputs (..., D) of any float dtype."""


@contextmanager
def predictors_in_loop(model: PreTrainedModel, predictors: PredictorSet) -> Iterator[None]:
    """Zero every neuron that is not predicted; predictors get the inputs PowerInfer gives them.

    The mask is on x1, so a norm between x1 and down sees only what was predicted.
    """
    if family_of(model.config, "model").experts is not None:
        with expert_predictors_in_loop(model, predictors):
            yield
        return
    with rules_in_loop(model, predictors.layers, predictors.threshold):
        yield


@contextmanager
def rules_in_loop(
    model: PreTrainedModel, rules: Sequence[Rule], threshold: float
) -> Iterator[None]:
    """Do as `predictors_in_loop` for a dense model, with one rule for each layer."""
    family = family_of(model.config, "model")
    handles = []
    for layer, rule in zip(family.decoder_layers(model), rules, strict=True):
        on_device = rule.to(model.device)
        seen: list[Tensor] = []

        def on_norm(_: nn.Module, args: tuple[Tensor, ...], seen: list[Tensor] = seen) -> None:
            seen[:] = [args[0]]

        def on_x1(
            _: nn.Module,
            args: tuple[Tensor, ...],
            seen: list[Tensor] = seen,
            rule: Rule = on_device,
        ) -> tuple[Tensor]:
            return (args[0] * (rule.logits(seen[0]) >= threshold),)

        handles.append(family.norm(layer).register_forward_pre_hook(on_norm))
        handles.append(layer.get_submodule(family.x1_reader).register_forward_pre_hook(on_x1))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def exact_in_loop(model: PreTrainedModel) -> Iterator[None]:
    """Compute the first projection of every FFN densely, the others only where it fires."""
    family = family_of(model.config, "model")
    if family.experts is not None:
        with exact_experts_in_loop(model, _sparse_ffn):
            yield
        return
    layers = family.decoder_layers(model)
    rule = activation_rule(model.config, "model")
    if family.gate is None:
        blocks = [layer.get_submodule(family.down) for layer in layers]
        forwards = [_sparse_product(block) for block in blocks]
    else:
        parent = family.down.rpartition(".")[0]
        blocks = [layer.get_submodule(parent) for layer in layers]
        forwards = [_sparse_ffn(*_parts(layer, family), relu_up=rule.on_up) for layer in layers]
    try:
        for block, forward in zip(blocks, forwards, strict=True):
            block.forward = forward
        yield
    finally:
        for block in blocks:
            del block.forward


def _sparse_product(down: Any) -> Callable[[Tensor], Tensor]:
    """The down projection over the non-zero entries of its input."""

    def forward(input: Tensor) -> Tensor:
        rounded = effective_input(down, input.reshape(-1, input.shape[-1]))
        out_TD: Tensor = rounded.float().to_sparse_csr() @ effective_weight(down).float().T
        if down.bias is not None:
            out_TD = out_TD + down.bias.float()
        return out_TD.to(input.dtype).view(*input.shape[:-1], -1)

    return forward


def _parts(layer: nn.Module, family: Family) -> list[nn.Module]:
    """Return what `_sparse_ffn` takes of a layer whose FFN has a gate."""
    assert family.gate is not None
    paths = [family.gate, family.up, family.down, family.act]
    if family.x1_norm is not None:
        paths.append(family.x1_norm)
    return [layer.get_submodule(path) for path in paths]


def _sparse_ffn(
    gate: Any, up: Any, down: Any, act: Any, norm: Any = None, *, relu_up: bool
) -> Callable[[Tensor], Tensor]:
    norm = nn.Identity() if norm is None else norm
    project = _sparse_product(down)

    def forward(x_BSD: Tensor) -> Tensor:
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        fired = act(gate(x_TD)).float().to_sparse_csr()
        zeros = _with_pattern(fired, torch.zeros_like(fired.values()))
        rounded_TD = effective_input(up, x_TD).float()
        sampled = torch.sparse.sampled_addmm(zeros, rounded_TD, effective_weight(up).float().T)
        ups = sampled.values()
        if up.bias is not None:
            ups = ups + up.bias.float()[sampled.col_indices()]
        x1 = _with_pattern(fired, fired.values() * (ups.relu() if relu_up else ups))
        # The norm needs the non-zero entries alone: zeros add nothing to the RMS and stay zero.
        return project(norm(x1.to_dense())).to(x_BSD.dtype).view(x_BSD.shape)

    return forward


def _with_pattern(like: Tensor, values: Tensor) -> Tensor:
    """CSR matrix with the pattern of `like`."""
    return torch.sparse_csr_tensor(
        like.crow_indices(), like.col_indices(), values, like.shape, check_invariants=False
    )
