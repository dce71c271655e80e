"""SmallThinker, which transformers 5 has no class for, built from its Mixtral.

A Mixtral with these differences (SmallThinker-4BA0.6B-Instruct and -21BA3B-Instruct, arXiv
2507.20984, and their published modeling file):

- ReLU in the experts, and tensors named `block_sparse_moe.primary_router` and
  `block_sparse_moe.experts.<e>.gate`, `up`, `down`;
- the router reads the layer's own input, before attention and any norm, so that experts can be
  fetched while attention runs;
- its weights are a sigmoid of the k largest logits, divided by their sum, or a softmax over them;
- `rope_layout` has a 0 where a layer's queries and keys are not rotated, and
  `sliding_window_layout` a 1 where a layer sees `sliding_window_size` tokens alone.

The class is registered under the model type `smallthinker` when this module is imported. With
flash attention every layer would have a window, so it is not offered.

Shape letters: B batch, S sequence, N tokens of a batch, E experts, k experts per token, D hidden.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache
from transformers.generation.utils import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.mixtral.modeling_mixtral import (
    MixtralAttention,
    MixtralPreTrainedModel,
    MixtralRMSNorm,
    MixtralRotaryEmbedding,
)

from sparsecast.core.errors import InputError
from sparsecast.core.models.expert_loop import ExpertLoop

MODEL_TYPE = "smallthinker"
FULL, SLIDING = "full_attention", "sliding_attention"
_ARGUMENTS = inspect.signature(create_causal_mask).parameters
CACHE = "cache" if "cache" in _ARGUMENTS else "past_key_values"
"""What this release of transformers calls the keys and values of earlier tokens."""


class SmallThinkerConfig(MixtralConfig):  # type: ignore[no-untyped-call]
    """Mixtral's fields, and those that are SmallThinker's own."""

    model_type = MODEL_TYPE
    rotated_layers: list[int] | None = None
    """Per layer whether queries and keys are rotated; all of them when unset."""
    layer_types: list[str] | None = None
    """Per layer `FULL` or `SLIDING`; full attention when unset."""
    router_softmax: bool = False


class Expert(nn.Module):
    """The matrices of one expert."""

    def __init__(self, config: SmallThinkerConfig) -> None:
        super().__init__()
        size, width = config.hidden_size, config.intermediate_size
        self.gate = nn.Linear(size, width, bias=False)
        self.up = nn.Linear(size, width, bias=False)
        self.down = nn.Linear(width, size, bias=False)


class Experts(nn.Module):
    """The experts of one layer, as experts.py describes them."""

    def __init__(self, config: SmallThinkerConfig) -> None:
        super().__init__()
        for expert in range(config.num_local_experts):
            self.add_module(str(expert), Expert(config))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x_ND: Tensor, chosen_Nk: Tensor, weight_Nk: Tensor) -> Tensor:
        return ExpertLoop(self)(x_ND, chosen_Nk, weight_Nk)


class MixtureOfExperts(nn.Module):
    """Router and experts of one layer."""

    def __init__(self, config: SmallThinkerConfig) -> None:
        super().__init__()
        self.primary_router = nn.Linear(config.hidden_size, config.num_local_experts, bias=False)
        self.experts = Experts(config)
        self.chosen = config.num_experts_per_tok
        self.softmax = config.router_softmax

    def forward(self, x_BSD: Tensor, routed_BSD: Tensor) -> Tensor:
        """
        Args:
            x_BSD: What the experts compute with.
            routed_BSD: What the router decides by.
        """
        logits_NE = self.primary_router(routed_BSD.reshape(-1, routed_BSD.shape[-1]))
        top_Nk, chosen_Nk = logits_NE.topk(self.chosen, dim=-1)
        if self.softmax:
            weight_Nk = top_Nk.softmax(-1, dtype=torch.float32)
        else:
            weight_Nk = top_Nk.sigmoid()
            weight_Nk = weight_Nk / weight_Nk.sum(-1, keepdim=True)
        x_ND = x_BSD.reshape(-1, x_BSD.shape[-1])
        out_ND: Tensor = self.experts(x_ND, chosen_Nk, weight_Nk.to(x_ND.dtype))
        return out_ND.view(x_BSD.shape)


class SmallThinkerLayer(nn.Module):
    """A decoder layer."""

    def __init__(self, config: SmallThinkerConfig, number: int) -> None:
        super().__init__()
        self.self_attn = MixtralAttention(config, number)
        self.block_sparse_moe = MixtureOfExperts(config)
        self.input_layernorm = MixtralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = MixtralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, h_BSD: Tensor, **attention: Any) -> Tensor:
        layer_input_BSD = h_BSD
        mixed_BSD, _ = self.self_attn(self.input_layernorm(h_BSD), **attention)
        h_BSD = h_BSD + mixed_BSD
        x_BSD = self.post_attention_layernorm(h_BSD)
        out_BSD: Tensor = h_BSD + self.block_sparse_moe(x_BSD, layer_input_BSD)
        return out_BSD


class SmallThinkerPreTrainedModel(MixtralPreTrainedModel):  # type: ignore[no-untyped-call]
    """What transformers asks of every model."""

    config_class = SmallThinkerConfig
    _no_split_modules = ["SmallThinkerLayer"]
    _supports_flash_attn = False
    _can_record_outputs = {}


class SmallThinkerModel(SmallThinkerPreTrainedModel):  # type: ignore[no-untyped-call]
    """The decoder."""

    def __init__(self, config: SmallThinkerConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        layers = (SmallThinkerLayer(config, number) for number in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(layers)
        self.norm = MixtralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = MixtralRotaryEmbedding(config)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        config: Any = self.config
        cache: Any = kwargs.get("cache", kwargs.get("past_key_values"))
        h_BSD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if (config.use_cache if use_cache is None else use_cache) and cache is None:
            cache = DynamicCache(config=config)
        if position_ids is None:
            seen = 0 if cache is None else cache.get_seq_length()
            position_ids = (torch.arange(h_BSD.shape[1], device=h_BSD.device) + seen)[None]
        given = {"attention_mask": attention_mask, CACHE: cache, "position_ids": position_ids}
        if "cache_position" in _ARGUMENTS:
            given["cache_position"] = position_ids[0]
        kinds = config.layer_types or [FULL] * len(self.layers)
        masks = {FULL: create_causal_mask(config, h_BSD, **given)}
        if SLIDING in kinds:
            masks[SLIDING] = create_sliding_window_causal_mask(config, h_BSD, **given)
        cos, sin = self.rotary_emb(h_BSD, position_ids=position_ids)
        # A rotation by no angle leaves queries and keys as they are, to the bit.
        rotations = [(torch.ones_like(cos), torch.zeros_like(sin)), (cos, sin)]
        rotated = config.rotated_layers or [1] * len(self.layers)
        for layer, kind, turns in zip(self.layers, kinds, rotated, strict=True):
            h_BSD = layer(
                h_BSD,
                position_embeddings=rotations[bool(turns)],
                attention_mask=masks[kind],
                **{CACHE: cache},
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(h_BSD), **{CACHE: cache})


class SmallThinkerForCausalLM(  # type: ignore[no-untyped-call]
    SmallThinkerPreTrainedModel, GenerationMixin
):
    """The decoder and its head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: SmallThinkerConfig) -> None:
        super().__init__(config)
        self.model = SmallThinkerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self, input_ids: Tensor | None = None, logits_to_keep: int = 0, **kwargs: Any
    ) -> CausalLMOutputWithPast:
        out = self.model(input_ids, **kwargs)
        logits = self.lm_head(out.last_hidden_state[:, -logits_to_keep:])
        return CausalLMOutputWithPast(logits=logits, **{CACHE: getattr(out, CACHE)})


_NAMES = {
    "moe_ffn_hidden_size": "intermediate_size",
    "moe_num_primary_experts": "num_local_experts",
    "moe_num_active_primary_experts": "num_experts_per_tok",
}
_ONLY = {
    "moe_enable_early_router": True,
    "moe_enable_secondary_experts": False,
    "moe_shared_primary_experts": 0,
    "use_qk_norm": False,
}
"""What older configs could choose, and the one choice that the published models have."""


def smallthinker_config(
    raw: Mapping[str, Any], where: str, rope: dict[str, Any]
) -> SmallThinkerConfig:
    """Build the config from the fields of a published config.json.

    Args:
        rope: transformers' `rope_parameters`.

    Raises:
        InputError: A field is missing, or asks for what the published models do not have.
    """
    if missing := next((name for name in _NAMES if raw.get(name) is None), None):
        raise InputError(
            f"{where}: a SmallThinker config needs a number under {missing}; download the config "
            "again"
        )
    for name, only in _ONLY.items():
        if raw.get(name, only) != only:
            raise InputError(
                f"{where}: {name} is {raw[name]!r}, expected {only!r}, as the published "
                "SmallThinker models have it; use one of those"
            )
    count = raw.get("num_hidden_layers")
    if not all(_layout(raw, "moe_layer_layout", count, where) or ()):
        raise InputError(
            f"{where}: moe_layer_layout names dense layers, which no published SmallThinker has, "
            "so the names of their tensors are unknown; use one whose layers all have experts"
        )
    windows = _layout(raw, "sliding_window_layout", count, where) or []
    known = {name: value for name, value in raw.items() if name in _FIELDS and value is not None}
    return SmallThinkerConfig(
        **{"tie_word_embeddings": True, "rms_norm_eps": 1e-6, **known},
        **{ours: raw[theirs] for theirs, ours in _NAMES.items()},
        architectures=["SmallThinkerForCausalLM"],
        hidden_act=raw.get("hidden_act", "relu"),
        rope_parameters=rope,
        rotated_layers=_layout(raw, "rope_layout", count, where),
        layer_types=[SLIDING if window else FULL for window in windows] or None,
        sliding_window=raw.get("sliding_window_size", 4096) if any(windows) else None,
        router_softmax=bool(raw.get("moe_primary_router_apply_softmax", False)),
    )


_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "initializer_range",
    "hidden_act_param",
    "dtype",
    "torch_dtype",
)


def _layout(raw: Mapping[str, Any], name: str, count: Any, where: str) -> list[int] | None:
    """Return a 0 or 1 for every layer, or None if the config has none."""
    value = raw.get(name)
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != count or not all(v in (0, 1) for v in value):
        raise InputError(
            f"{where}: {name} is {str(value)[:40]}, expected a 0 or a 1 for each of {count} "
            "layers; correct it, or download the config again"
        )
    return value


AutoConfig.register(MODEL_TYPE, SmallThinkerConfig)
AutoModelForCausalLM.register(SmallThinkerConfig, SmallThinkerForCausalLM)
