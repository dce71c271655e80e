"""Record what PowerInfer's predictors will see and which FFN neurons fired.

Two hooks a layer and nothing stored: one on the FFN norm, whose input is the predictor's input,
one on the down projection, whose input is x1 = act(gate) * up. `sink` decides what to keep.

Shape letters: B batch, S sequence, T kept tokens, D hidden, F FFN width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from sparsecast.collect.families import family_of


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """One layer of one forward pass, padding removed, tokens in batch-major order."""

    layer: int
    x_TD: Tensor
    """Predictor input in the model's dtype."""
    x1_TF: Tensor
    """Input of the down projection in the model's dtype; a neuron fired where it is non-zero."""


class Recorder:
    """Stream a `LayerRecord` per chosen layer out of every forward pass.

        with Recorder(model, sink) as recorder:
            recorder.keep(batch.keep_BS)
            model.model(batch.ids_BS)

    Memory: one layer's input between its two hooks.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sink: Callable[[LayerRecord], None],
        layers: list[int] | None = None,
    ) -> None:
        family = family_of(model.config, str(model.config.name_or_path))
        blocks = family.decoder_layers(model)
        chosen = range(len(blocks)) if layers is None else layers
        self._modules = [
            (i, blocks[i].get_submodule(family.norm), blocks[i].get_submodule(family.down))
            for i in chosen
        ]
        self._sink = sink
        self._keep_N: Tensor | None = None
        self._x_TD: Tensor | None = None
        self._handles: list[RemovableHandle] = []

    def keep(self, keep_BS: Tensor) -> None:
        """Which positions of the next forward pass are real; the others are dropped."""
        self._keep_N = keep_BS.flatten()

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
        self._x_TD = None

    def _rows(self, value: Tensor) -> Tensor:
        flat = value.detach().reshape(-1, value.shape[-1])
        return flat if self._keep_N is None else flat[self._keep_N]

    def _on_norm(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._x_TD = self._rows(args[0])

    def _on_down(self, layer: int, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert self._x_TD is not None
        self._sink(LayerRecord(layer, self._x_TD, self._rows(args[0])))
        self._x_TD = None
