"""Run a transformers model with sparse FFNs: with predictors in the loop, or exactly.

Shape letters: B batch, S sequence, T tokens, D hidden, F FFN width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsecast.core.models.families import activation_rule, family_of
from sparsecast.predictors.checkpoint import PredictorSet
from sparsecast.predictors.predictor import Predictor


@contextmanager
def predictors_in_loop(model: PreTrainedModel, predictors: PredictorSet) -> Iterator[None]:
    """Zero every neuron that is not predicted; predictors get the inputs PowerInfer gives them."""
    family = family_of(model.config, "model")
    handles = []
    for layer, predictor in zip(family.decoder_layers(model), predictors.layers, strict=True):
        on_device = predictor.to(model.device)
        seen: list[Tensor] = []

        def on_norm(_: nn.Module, args: tuple[Tensor, ...], seen: list[Tensor] = seen) -> None:
            seen[:] = [args[0]]

        def on_down(
            _: nn.Module,
            args: tuple[Tensor, ...],
            seen: list[Tensor] = seen,
            predictor: Predictor = on_device,
        ) -> tuple[Tensor]:
            return (args[0] * (predictor.logits(seen[0]) >= predictors.threshold),)

        handles.append(family.norm(layer).register_forward_pre_hook(on_norm))
        handles.append(layer.get_submodule(family.down).register_forward_pre_hook(on_down))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def exact_in_loop(model: PreTrainedModel) -> Iterator[None]:
    """Compute the first projection of every FFN densely, the others only where it fires."""
    family = family_of(model.config, "model")
    layers = family.decoder_layers(model)
    rule = activation_rule(model.config, "model")
    if family.gate is None:
        blocks = [layer.get_submodule(family.down) for layer in layers]
        forwards = [_sparse_down(block) for block in blocks]
    else:
        parent = family.down.rpartition(".")[0]
        blocks = [layer.get_submodule(parent) for layer in layers]
        paths = (family.gate, family.up, family.down, family.act)
        forwards = [
            _sparse_ffn(*(layer.get_submodule(path) for path in paths), relu_up=rule.on_up)
            for layer in layers
        ]
    try:
        for block, forward in zip(blocks, forwards, strict=True):
            block.forward = forward
        yield
    finally:
        for block in blocks:
            del block.forward


def _sparse_down(down: Any) -> Callable[[Tensor], Tensor]:
    def forward(x1: Tensor) -> Tensor:
        x1_TF = x1.reshape(-1, x1.shape[-1]).float().to_sparse_csr()
        out_TD: Tensor = x1_TF @ down.weight.float().T
        if down.bias is not None:
            out_TD = out_TD + down.bias.float()
        return out_TD.to(x1.dtype).view(*x1.shape[:-1], -1)

    return forward


def _sparse_ffn(
    gate: Any, up: Any, down: Any, act: Any, *, relu_up: bool
) -> Callable[[Tensor], Tensor]:
    def product(like: Tensor, values: Tensor) -> Tensor:
        """CSR matrix with the pattern of `like`."""
        return torch.sparse_csr_tensor(
            like.crow_indices(), like.col_indices(), values, like.shape, check_invariants=False
        )

    def forward(x_BSD: Tensor) -> Tensor:
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        fired = act(gate(x_TD)).float().to_sparse_csr()
        zeros = product(fired, torch.zeros_like(fired.values()))
        sampled = torch.sparse.sampled_addmm(zeros, x_TD.float(), up.weight.float().T)
        ups = sampled.values().relu() if relu_up else sampled.values()
        out_TD: Tensor = product(fired, fired.values() * ups) @ down.weight.float().T
        return out_TD.to(x_BSD.dtype).view(x_BSD.shape)

    return forward
