"""Record the predictors' inputs and the FFN neurons that fired.

Each layer has two hooks: one on the FFN norm, whose input is the predictor's input, and one on the
module that reads x1 = act(gate) * up, or act(fc1 x + b) without a gate: the down projection, or the
norm in front of it (`Family.x1_reader`).

Neuron j has fired where x1_j is not zero as the model computes it, in the model's dtype: a product
or a square that underflows there, such as that of 1e-4 in float16, is a zero like any other.

Shape letters: N places of a batch, padding included, D hidden, F FFN width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from sparsecast.core.models.families import family_of

Sink = Callable[[int, Tensor, Tensor], None]
"""Takes (layer, predictor input (N, D), x1 (N, F)), both in the model's dtype, neuron j having
fired where x1 is non-zero."""


class Recorder:
    """Pass each layer's input and activations to a sink, in order, at every forward pass.

        with Recorder(model, sink):
            model.base_model(ids_BS)

    Memory: one layer's input between its two hooks.
    """

    def __init__(self, model: PreTrainedModel, sink: Sink, layers: list[int] | None = None) -> None:
        family = family_of(model.config, str(model.config.name_or_path))
        blocks = family.decoder_layers(model)
        chosen = range(len(blocks)) if layers is None else layers
        self._modules = [
            (i, family.norm(blocks[i]), blocks[i].get_submodule(family.x1_reader)) for i in chosen
        ]
        self._sink = sink
        self._x_ND: Tensor | None = None
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Recorder:
        for layer, norm, reader in self._modules:
            self._handles += [
                norm.register_forward_pre_hook(self._on_norm),
                reader.register_forward_pre_hook(partial(self._on_x1, layer)),
            ]
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._x_ND = None

    def _on_norm(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._x_ND = _flat(args[0])

    def _on_x1(self, layer: int, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert self._x_ND is not None
        self._sink(layer, self._x_ND, _flat(args[0]))
        self._x_ND = None


def _flat(value: Tensor) -> Tensor:
    return value.detach().reshape(-1, value.shape[-1])
