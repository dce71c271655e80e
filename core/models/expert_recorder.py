"""Record the predictors' inputs, the router's choice and x1 of a mixture of experts.

The predictor's input is the residual stream before the FFN norm, as in a dense model; all experts
of a token share it.

Shape letters: N places of a batch, padding included, k experts per token, D hidden, F FFN width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from sparsecast.core.models.experts import expert_loops, expert_modules
from sparsecast.core.models.families import family_of

ExpertSink = Callable[[int, Tensor, Tensor, Tensor], None]
"""Takes (layer, predictor input (N, D), chosen experts (N, k) int64, x1 of the chosen experts
(N, k, F)); neuron j of a token's expert having fired where its x1 is non-zero."""


class ExpertRecorder:
    """Pass each layer's inputs, choices and activations to a sink, at every forward pass.

        with ExpertRecorder(model, sink):
            model.base_model(ids_BS)

    Memory: one layer's input and x1.

    Args:
        model: Loaded by `load_model`, which installs its `ExpertLoop`s.
    """

    def __init__(
        self, model: PreTrainedModel, sink: ExpertSink, layers: list[int] | None = None
    ) -> None:
        self._family = family_of(model.config, str(model.config.name_or_path))
        self._blocks = self._family.decoder_layers(model)
        self._experts, self._loops = expert_modules(model), expert_loops(model)
        self._layers = range(len(self._blocks)) if layers is None else layers
        self._sink = sink
        self._x_ND: Tensor | None = None
        self._x1_NkF: Tensor | None = None
        self._chosen_Nk: Tensor | None = None
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> ExpertRecorder:
        for layer in self._layers:
            norm, experts = self._family.norm(self._blocks[layer]), self._experts[layer]
            self._loops[layer].on_x1 = self._on_x1
            self._handles += [
                norm.register_forward_pre_hook(self._on_norm),
                experts.register_forward_pre_hook(self._before),
                experts.register_forward_hook(partial(self._after, layer)),
            ]
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for layer in self._layers:
            self._loops[layer].on_x1 = None
        self._x_ND = self._x1_NkF = self._chosen_Nk = None

    def _on_norm(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._x_ND = args[0].detach().reshape(-1, args[0].shape[-1])

    def _before(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._chosen_Nk, self._x1_NkF = args[1], None

    def _on_x1(self, _: int, token_T: Tensor, slot_T: Tensor, x1_TF: Tensor) -> Tensor:
        assert self._chosen_Nk is not None
        if self._x1_NkF is None:  # every place is written: each choice belongs to one expert
            self._x1_NkF = x1_TF.new_empty(*self._chosen_Nk.shape, x1_TF.shape[1])
        self._x1_NkF[token_T, slot_T] = x1_TF.detach()
        return x1_TF

    def _after(self, layer: int, *_: object) -> None:
        assert self._x_ND is not None
        assert self._chosen_Nk is not None
        assert self._x1_NkF is not None
        self._sink(layer, self._x_ND, self._chosen_Nk, self._x1_NkF)
        self._x_ND = self._x1_NkF = self._chosen_Nk = None
