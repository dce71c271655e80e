"""Configs of models that need remote code on the hub, read by transformers' own classes.

    sparsellama             Llama; ProSparse's FATReLU is ours
    llama_sparse_relu       Llama with ReLU, whatever hidden_act says; Arcee where it has no gate
    bamboo, turbosparse...  Mistral with ReLU on gate and up; predictors inside the file are ignored
    turbosparsemixtral      Mixtral with ReLU on gate and up, in the same way
    minicpm                 Granite, which is Llama with MiniCPM's scales applied at run time
    smallthinker            a class of ours, see smallthinker.py
    falcon, RefinedWeb...   Falcon, whose first configs named sizes n_layer, n_head and n_head_kv

Tensor names are those of the class that stands in, so only the config changes. No remote code is
loaded. The configs' fields: ProSparse-7B, Bamboo-base-v0_1, MiniCPM-S-1B-sft and SparseLM on the
hub, and thunlp/SparsingLaw, whose models have MiniCPM's code and no `model_type`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from transformers import (
    ArceeConfig,
    FalconConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
)

from sparsecast.core.errors import InputError
from sparsecast.core.models.smallthinker import smallthinker_config

_FOREIGN = ("model_type", "architectures", "auto_map", "transformers_version", "rope_scaling")


def _common(raw: dict[str, Any]) -> dict[str, Any]:
    fields = {key: value for key, value in raw.items() if key not in _FOREIGN}
    # Older configs have rope_theta and rope_scaling, which transformers 5 keeps as one.
    scaling = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    theta = fields.pop("rope_theta", 10_000.0)
    rope = {"rope_theta": theta, **scaling, "rope_type": kind}
    rope.pop("type", None)
    return {**fields, "rope_parameters": rope}


def _sparsellama(raw: dict[str, Any], where: str) -> PreTrainedConfig:
    return LlamaConfig(**_common(raw), architectures=["LlamaForCausalLM"])


def _sparse_lm(raw: dict[str, Any], where: str) -> PreTrainedConfig:
    """Read a SparseLM: its FFN has ReLU in code and its own width, and may have no gate."""
    fields = {key: value for key, value in _common(raw).items() if not key.startswith("sparsity_")}
    fields["hidden_act"] = "relu"
    if (width := raw.get("sparsity_new_intermediate_size")) is not None:
        fields["intermediate_size"] = width
    if raw.get("sparsity_gated_mlp", True):
        return LlamaConfig(**fields, architectures=["LlamaForCausalLM"])
    return ArceeConfig(**fields, architectures=["ArceeForCausalLM"])


def _drelu(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the fields of a model that has ReLU on gate and up, whatever its config calls it."""
    fields = _common(raw)
    if fields.get("hidden_act") not in ("relu", "drelu"):
        raise InputError(
            f"{where}: hidden_act is {fields.get('hidden_act')!r}, expected 'relu' in a model of "
            "the Bamboo family, which has it on gate and up"
        )
    return {**fields, "hidden_act": "drelu"}


def _bamboo(raw: dict[str, Any], where: str) -> PreTrainedConfig:
    return MistralConfig(**_drelu(raw, where), architectures=["MistralForCausalLM"])


def _turbosparse_mixtral(raw: dict[str, Any], where: str) -> PreTrainedConfig:
    return MixtralConfig(**_drelu(raw, where), architectures=["MixtralForCausalLM"])


def _minicpm(raw: dict[str, Any], where: str) -> PreTrainedConfig:
    fields = _common(raw)
    try:
        embedding = float(fields.pop("scale_emb"))
        depth, base = float(fields.pop("scale_depth")), float(fields.pop("dim_model_base"))
        hidden, heads = int(fields["hidden_size"]), int(fields["num_attention_heads"])
        layers = int(fields["num_hidden_layers"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{where}: a MiniCPM config needs numbers under scale_emb, scale_depth, "
            f"dim_model_base, hidden_size, num_attention_heads and num_hidden_layers ({error})"
        ) from error
    if fields.get("head_dim") is None:
        fields.pop("head_dim", None)
    # MiniCPM's config class ties the embeddings unless told otherwise.
    fields.setdefault("tie_word_embeddings", True)
    return GraniteConfig(
        **fields,
        architectures=["GraniteForCausalLM"],
        embedding_multiplier=embedding,
        residual_multiplier=depth / math.sqrt(layers),
        logits_scaling=hidden / base,
        attention_multiplier=fields.get("head_dim", hidden // heads) ** -0.5,
    )


def _smallthinker(raw: dict[str, Any], where: str) -> PreTrainedConfig:
    return smallthinker_config(raw, where, _common(raw)["rope_parameters"])


def _falcon(raw: dict[str, Any], where: str) -> PreTrainedConfig:
    fields = {_FALCON.get(key, key): value for key, value in _common(raw).items()}
    fields.setdefault("new_decoder_architecture", raw["model_type"] == "RefinedWeb")
    return FalconConfig(**fields, architectures=["FalconForCausalLM"])


_FALCON = {
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_head_kv": "num_kv_heads",
}
REMAPPED: dict[str, Callable[[dict[str, Any], str], PreTrainedConfig]] = {
    "sparsellama": _sparsellama,
    "llama_sparse_relu": _sparse_lm,
    "bamboo": _bamboo,
    "turbosparsemistral": _bamboo,
    "turbosparsemixtral": _turbosparse_mixtral,
    "minicpm": _minicpm,
    "smallthinker": _smallthinker,
    "falcon": _falcon,
    "RefinedWeb": _falcon,
    "RefinedWebModel": _falcon,
}
"""model_type to a function of (config.json, model's name)."""
_RELU_IN_CODE = ("llama_sparse_relu",)
_ARCHITECTURES = {
    "SparseLlamaForCausalLM": "sparsellama",
    "BambooForCausalLM": "bamboo",
    "MiniCPMForCausalLM": "minicpm",
    "TurboSparseMixtralForCausalLM": "turbosparsemixtral",
    "MixtralForCausalLM": "mixtral",
    "SmallThinkerForCausalLM": "smallthinker",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "GraniteForCausalLM": "granite",
    "OPTForCausalLM": "opt",
    "FalconForCausalLM": "falcon",
}
"""Configs without model_type name the class alone: MiniCPM's and those derived from it."""


def model_type_of(raw: Mapping[str, Any]) -> object:
    """Return config.json's `model_type`, else the one that `architectures` implies, else None."""
    if (kind := raw.get("model_type")) is not None:
        return kind
    named = raw.get("architectures")
    for name in named if isinstance(named, list) else []:
        if isinstance(name, str) and (kind := _ARCHITECTURES.get(name)):
            return kind
    return None


def ignored_activation(raw: Mapping[str, Any]) -> str | None:
    """Return the activation in config.json that the type's own code ignores, if it is not ReLU."""
    named = raw.get("hidden_act", "relu")
    return str(named) if model_type_of(raw) in _RELU_IN_CODE and named != "relu" else None
