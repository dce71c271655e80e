"""Run a mixture of experts with sparse experts: with predictors in the loop, or exactly.

Shape letters: N places of a batch, T tokens of one expert, D hidden, F FFN width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsecast.core.models.expert_loop import expert_matrices
from sparsecast.core.models.experts import expert_loops, expert_modules
from sparsecast.core.models.families import family_of
from sparsecast.core.models.shape import model_shape
from sparsecast.predictors.checkpoint import PredictorSet


@contextmanager
def expert_predictors_in_loop(model: PreTrainedModel, predictors: PredictorSet) -> Iterator[None]:
    """Zero every neuron of a token's experts that its predictor does not select.

    Memory: all predictors on the model's device.
    """
    family = family_of(model.config, "model")
    blocks, loops = family.decoder_layers(model), expert_loops(model)
    experts, device = model_shape(model).experts, model.device
    handles = []
    for layer, (block, loop) in enumerate(zip(blocks, loops, strict=True)):
        own = [p.to(device) for p in predictors.layers[layer * experts : (layer + 1) * experts]]
        seen: list[Tensor] = []

        def on_norm(_: nn.Module, args: tuple[Tensor, ...], seen: list[Tensor] = seen) -> None:
            seen[:] = [args[0].reshape(-1, args[0].shape[-1])]

        def on_x1(
            expert: int,
            token_T: Tensor,
            _: Tensor,
            x1_TF: Tensor,
            seen: list[Tensor] = seen,
            own: list[Any] = own,
        ) -> Tensor:
            logits_TF: Tensor = own[expert].logits(seen[0][token_T])
            return x1_TF * (logits_TF >= predictors.threshold)

        handles.append(family.norm(block).register_forward_pre_hook(on_norm))
        loop.on_x1 = on_x1
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for loop in loops:
            loop.on_x1 = None


@contextmanager
def exact_experts_in_loop(model: PreTrainedModel, sparse_ffn: Any) -> Iterator[None]:
    """Compute the gate of every expert densely, its other matrices only where the gate fires.

    Args:
        sparse_ffn: Makes such a forward pass from (gate, up, down, act, relu_up=...), modules or
            what has their `weight` and `bias`.
    """
    loops = expert_loops(model)

    def ffn(module: Any, relu_up: bool, expert: int, x_TD: Tensor) -> Tensor:
        gate, up, down = expert_matrices(module, expert)
        linear = partial(nn.functional.linear, weight=gate)
        others = (SimpleNamespace(weight=weight, bias=None) for weight in (up, down))
        out_TD: Tensor = sparse_ffn(linear, *others, module.act_fn, relu_up=relu_up)(x_TD)
        return out_TD

    for module, loop in zip(expert_modules(model), loops, strict=True):
        loop.ffn = partial(ffn, module, loop.relu_up)
    try:
        yield
    finally:
        for loop in loops:
            loop.ffn = None
