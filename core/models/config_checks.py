"""Check config.json before a model is built from it: types, ranges, and the weights' shapes.

A config is a stranger's text. Its sizes decide how much is allocated and how long a loop runs, so
they are compared with what the weights' headers say first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from sparsecast.core.errors import InputError, reason_of
from sparsecast.core.models.families import FAMILIES, Family
from sparsecast.core.models.pretrained import empty_model
from sparsecast.core.options import short_repr

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "ffn_dim",
    "ffn_hidden_size",
    "num_hidden_layers",
    "n_layer",
    "num_attention_heads",
    "n_head",
    "num_key_value_heads",
    "num_kv_heads",
    "n_head_kv",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "word_embed_proj_dim",
    "dim_model_base",
    "sliding_window",
    "sparsity_new_intermediate_size",
    "sliding_window_size",
    "num_local_experts",
    "moe_ffn_hidden_size",
    "moe_num_primary_experts",
    "moe_num_active_primary_experts",
    "num_experts_per_tok",
    "no_rope_layer_interval",
)
_POSITIVE = (
    "rope_theta",
    "scale_emb",
    "scale_depth",
    "embedding_multiplier",
    "residual_multiplier",
    "attention_multiplier",
    "logits_scaling",
    "final_logit_softcapping",
    "attn_logit_softcapping",
    "query_pre_attn_scalar",
    "clip_qkv",
)
_SHARES = ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_eps")
_DROPOUTS = ("attention_dropout", "hidden_dropout", "dropout", "activation_dropout", "layerdrop")
_LARGEST_SIZE = 2**31 - 1
_LARGEST_NUMBER = 1e12


def check_fields(raw: Mapping[str, Any], path: Path) -> None:
    """Refuse impossible numbers in config.json before a config class computes with them.

    Absent fields and null are left to the classes, which have defaults.

    Raises:
        InputError: Names the field.
    """
    for name in _SIZES:
        value = raw.get(name)
        if value is not None and not (_whole(value) and 1 <= value <= _LARGEST_SIZE):
            raise _wrong(path, name, value, f"a whole number from 1 to {_LARGEST_SIZE:,}")
    for name in _POSITIVE:
        _check_number(raw, path, name, "above 0 and at most 1e12", 0, _LARGEST_NUMBER)
    for name in (*_SHARES, *_DROPOUTS):
        _check_number(raw, path, name, "from 0 to 1", 0, 1)
    _check_number(raw, path, "partial_rotary_factor", "above 0 and at most 1", 0, 1)
    for name in ("rope_scaling", "rope_parameters"):
        _check_rope(raw.get(name), path, name)
    classes = raw.get("architectures")
    if classes is not None and not (
        isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    ):
        raise _wrong(path, "architectures", classes, "a list of names or null")
    if (found := raw.get("transformers_weights")) is not None:
        raise InputError(
            f"{path}: transformers_weights is {short_repr(found)}, expected the weights in "
            "model.safetensors or the shards of model.safetensors.index.json; rename them and "
            "remove the field"
        )
    if raw.get("per_layer_config") is not None:
        raise InputError(
            f"{path}: per_layer_config makes layers of different kinds, expected layers of one "
            "kind; such a model has no row in the table of families"
        )


def _check_rope(rope: object, path: Path, name: str) -> None:
    if rope is None:
        return
    if not isinstance(rope, dict):
        raise _wrong(path, name, rope, "an object or null")
    for field in ("factor", "rope_theta"):
        _check_number(rope, path, field, "above 0 and at most 1e12", 0, _LARGEST_NUMBER)
    _check_number(rope, path, "partial_rotary_factor", "above 0 and at most 1", 0, 1)


def _check_number(
    raw: Mapping[str, Any], path: Path, name: str, wanted: str, least: float, most: float
) -> None:
    """Check one number; `least` itself is allowed only if `wanted` says "from"."""
    value = raw.get(name)
    if value is None:
        return
    number = isinstance(value, int | float) and not isinstance(value, bool)
    first = wanted.startswith("from")
    if not number or not least <= value <= most or (value == least and not first):
        raise _wrong(path, name, value, f"a number {wanted}")


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _wrong(path: Path, name: str, value: object, wanted: str) -> InputError:
    return InputError(
        f"{path}: {name} is {short_repr(value)}, expected {wanted}; correct it, or download the "
        "config again"
    )


def check_shapes(
    config: PreTrainedConfig, stored: Mapping[str, tuple[int, ...]], folder: Path
) -> None:
    """Compare the model that a config describes with the shapes in the weights' headers.

    Time and memory are those of the files' layers, whatever the config says.

    Args:
        config: Of a family with a row in the table.
        stored: Every tensor's name and shape.

    Raises:
        InputError: Another number of layers, or a tensor of another shape.
    """
    family = FAMILIES[config.model_type]
    layers = family.layers.rpartition(".")[2]
    numbers = (re.search(rf"(?:^|\.){layers}\.(\d+)\.", name) for name in stored)
    held = len({found[1] for found in numbers if found})
    if held != config.num_hidden_layers:
        raise InputError(
            f"{folder}: config.json describes {config.num_hidden_layers:,} layers, but the weights "
            f"hold {held:,}; give the config and the weights of one model"
        )
    if family.experts is not None:
        _check_experts(config, family, stored, folder)
    try:
        described = empty_model(config).state_dict()
    except Exception as error:  # a model's class meets absurd fields, each in its own way
        raise InputError(
            f"{folder}: transformers cannot build the model that config.json describes "
            f"({reason_of(error)}); give the config and the weights of one model"
        ) from error
    for name, tensor in described.items():
        shape = stored.get(name, stored.get(name.partition(".")[2]))
        if shape is not None and shape != tuple(tensor.shape):
            raise InputError(
                f"{folder}: tensor {name} is {list(shape)}, but config.json describes "
                f"{list(tensor.shape)}; give the config and the weights of one model"
            )


def _check_experts(
    config: Any, family: Family, stored: Mapping[str, tuple[int, ...]], folder: Path
) -> None:
    """Compare the experts that a config describes with those of the files, which name each matrix.

    Files with 3-D tensors have the model's own names, which `check_shapes` compares.
    """
    count, chosen = config.num_local_experts, config.num_experts_per_tok
    if not 1 <= chosen <= count:
        raise InputError(
            f"{folder}: config.json routes each token to {chosen:,} of {count:,} experts, expected "
            f"1 to {count:,}; correct it, or download the config again"
        )
    place = re.escape(family.stored_experts)
    named = (re.search(rf"\.{place}\.(\d{{1,9}})\.", name) for name in stored)
    held = {int(found[1]) for found in named if found}
    if not held:
        return
    if len(held) != count or held != set(range(count)):
        raise InputError(
            f"{folder}: config.json describes {count:,} experts per layer, but the weights hold "
            f"{len(held):,}; give the config and the weights of one model"
        )
    wide, narrow = config.intermediate_size, config.hidden_size
    shapes = {family.gate: (wide, narrow), family.up: (wide, narrow), family.down: (narrow, wide)}
    for layer in range(config.num_hidden_layers):
        for expert in range(count):
            for matrix, want in shapes.items():
                rest = f"{layer}.{family.stored_experts}.{expert}.{matrix}.weight"
                name = f"{family.layers}.{rest}"
                shape = stored.get(name, stored.get(name.partition(".")[2]))
                if shape is None:
                    raise InputError(
                        f"{folder}: tensor {name} is missing; download or save the weights again"
                    )
                if shape != want:
                    raise InputError(
                        f"{folder}: tensor {name} is {list(shape)}, but config.json describes "
                        f"{list(want)}; give the config and the weights of one model"
                    )


def check_pad_token(config: PreTrainedConfig, folder: Path) -> None:
    """Refuse a padding token without a row in the embedding."""
    pad, rows = getattr(config, "pad_token_id", None), config.vocab_size
    if pad is not None and not (_whole(pad) and -rows <= pad < rows):
        raise InputError(
            f"{folder}: pad_token_id is {short_repr(pad)} in config.json, but the model has an "
            f"embedding for ids 0 to {rows - 1:,} (vocab_size); correct it, or set it to null"
        )
