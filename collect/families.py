"""Which submodule is what, for every model family; the only place that knows module names.

Adding a family is adding a row to `FAMILIES`. The predictor's input is taken where PowerInfer
takes it (llama.cpp of PowerInfer, `llm_build_ffn_sparse` and its callers): for llama the residual
stream after attention and before the FFN norm, which is that norm's input.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from sparsecast.collect.activations import ActivationRule
from sparsecast.collect.errors import InputError

RESIDUAL_BEFORE_FFN_NORM = "residual-before-ffn-norm"


@dataclass(frozen=True, kw_only=True)
class Family:
    """Module paths; `norm` to `act` are relative to one decoder layer."""

    layers: str
    """The list of decoder layers, from the causal LM."""
    norm: str
    """The module whose input is the predictor's input."""
    gate: str
    up: str
    down: str
    """The module whose input is x1."""
    act: str
    """The activation module."""
    convention: str
    """Name of the predictor's input, as PRED and ACTS manifests record it."""

    def decoder_layers(self, model: PreTrainedModel) -> list[nn.Module]:
        layers = model.get_submodule(self.layers)
        assert isinstance(layers, nn.ModuleList)
        return list(layers)


_LLAMA = Family(
    layers="model.layers",
    norm="post_attention_layernorm",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
    act="mlp.act_fn",
    convention=RESIDUAL_BEFORE_FFN_NORM,
)

FAMILIES = {"llama": _LLAMA, "mistral": _LLAMA}


def family_of(config: PreTrainedConfig, where: str) -> Family:
    """The row for a model; `where` names the model in the error."""
    if config.model_type not in FAMILIES:
        raise InputError(
            f"{where}: model_type is {config.model_type!r}, expected one of {', '.join(FAMILIES)}; "
            "sparsecast.collect.families has the table, and adding a family is adding a row"
        )
    return FAMILIES[config.model_type]


def activation_rule(
    config: PreTrainedConfig, where: str, threshold: float | None = None
) -> ActivationRule:
    """The activation as the checkpoint's config states it.

    Args:
        config: With `hidden_act` "relu", or "fatrelu" and `hidden_act_param` as ProSparse writes.
        where: Names the model in the error.
        threshold: Overrides the config: FATReLU with this T, for a config that lost it.
    """
    name = getattr(config, "hidden_act", None)
    if name not in ("relu", "fatrelu"):
        raise InputError(
            f"{where}: hidden_act is {name!r}, which leaves no exact zeros in the FFN; expected "
            "'relu' or 'fatrelu'. `sparsecast sparsify` turns such a model into a sparse one "
            "(ReLU substitution, progressive L1 regularisation, threshold shift)"
        )
    if threshold is not None:
        return ActivationRule("fatrelu", threshold)
    if name == "relu":
        return ActivationRule("relu")
    param = getattr(config, "hidden_act_param", None)
    if not isinstance(param, (int, float)) or isinstance(param, bool) or param < 0:
        raise InputError(
            f"{where}: hidden_act is 'fatrelu' but hidden_act_param is {param!r}, expected a "
            "number >= 0; give the threshold with --activation-threshold"
        )
    return ActivationRule("fatrelu", float(param))
