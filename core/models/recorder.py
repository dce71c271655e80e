"""Record the predictors' inputs and the FFN neurons that fired.

Each layer has two hooks: one on the FFN norm, whose input is the predictor's input, and one on the
down projection, whose input is x1 = act(gate) * up, or act(fc1 x + b) without a gate.

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
            (i, family.norm(blocks[i]), blocks[i].get_submodule(family.down)) for i in chosen
        ]
        self._sink = sink
        self._x_ND: Tensor | None = None
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Recorder:
        for layer, norm, down in self._modules:
            self._handles += [
                norm.register_forward_pre_hook(self._on_norm),
                down.register_forward_pre_hook(partial(self._on_down, layer)),
            ]
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._x_ND = None

    def _on_norm(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._x_ND = _flat(args[0])

    def _on_down(self, layer: int, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert self._x_ND is not None
        self._sink(layer, self._x_ND, _flat(args[0]))
        self._x_ND = None


def _flat(value: Tensor) -> Tensor:
    return value.detach().reshape(-1, value.shape[-1])
