"""Compare the file's header with the model's config.json, whose fields have old and new names."""

from __future__ import annotations

from math import isclose
from typing import Any

from sparsecast.export.checks.base import Check
from sparsecast.export.checks.sources import Source
from sparsecast.export.read.header import EPSILON

FIELDS: dict[str, dict[str, tuple[str, ...]]] = {
    "llama": {
        "block_count": ("num_hidden_layers",),
        "embedding_length": ("hidden_size",),
        "feed_forward_length": ("intermediate_size",),
        "attention.head_count": ("num_attention_heads",),
    },
    "falcon": {
        "block_count": ("num_hidden_layers", "n_layer"),
        "embedding_length": ("hidden_size",),
        "feed_forward_length": ("ffn_hidden_size",),
        "attention.head_count": ("num_attention_heads", "n_head"),
    },
    "opt": {
        "block_count": ("num_hidden_layers",),
        "embedding_length": ("hidden_size",),
        "feed_forward_length": ("ffn_dim",),
        "attention.head_count": ("num_attention_heads",),
    },
}
"""Keys of the file to fields of config.json, of which the first that is there counts."""


ARCHITECTURES = {
    "falcon": "falcon",
    "RefinedWeb": "falcon",
    "RefinedWebModel": "falcon",
    "opt": "opt",
    "bamboo": "bamboo",
    "turbosparsemistral": "bamboo",
}
"""Architectures by model_type; other models are llamas unless they have ReLU on gate and up."""

ACTIVATIONS = ("hidden_act", "activation_function", "activation")
"""Names of the field for the activation."""


def check_header(source: Source) -> Check:
    """Compare the architecture, sizes, the norms' epsilon and rope."""
    keys: dict[str, Any] = source.file.keys
    arch, config = source.header.arch, source.config
    both = config.get("hidden_act") == "drelu"
    if "relu2" in (config.get(name) for name in ACTIVATIONS):
        return Check("header", False, "config.json has ReLU², which the engine does not compute")
    meant = "bamboo" if both else ARCHITECTURES.get(config.get("model_type", ""), "llama")
    if arch != meant:
        return Check("header", False, f"the file holds a {arch}, config.json describes a {meant}")
    want = {
        key: next((config[name] for name in names if name in config), None)
        for key, names in FIELDS.get(arch, FIELDS["llama"]).items()
    }
    if arch == "falcon" and want["feed_forward_length"] is None:
        want["feed_forward_length"] = 4 * config["hidden_size"]
    want["context_length"] = config.get("max_position_embeddings", 2048)
    want[EPSILON[arch]] = config.get("rms_norm_eps", 1e-6)
    if arch in ("falcon", "opt"):
        want[EPSILON[arch]] = config.get("layer_norm_epsilon", 1e-5)
    wrong = [
        f"{arch}.{key} is {keys[f'{arch}.{key}']:g}, config.json has {value:g}"
        for key, value in want.items()
        if value is not None and not isclose(keys[f"{arch}.{key}"], value, rel_tol=1e-6)
    ]
    for key, (found, value) in _optional(source).items():
        if not isclose(found, value, rel_tol=1e-6):
            wrong.append(f"{arch}.{key} is {found:g}, config.json has {value:g}")
    return Check("header", not wrong, "; ".join(wrong) or "as in config.json")


def _optional(source: Source) -> dict[str, tuple[float, float]]:
    """Return, by key, the value that the engine uses, defaults included, and the model's."""
    header, config = source.header, source.config
    arch, heads = header.arch, header.heads
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    kv_heads = config.get("num_key_value_heads") or heads
    if arch == "falcon":
        kv_heads = _falcon_kv_heads(config, heads)
    found: dict[str, tuple[float, float]] = {"attention.head_count_kv": (header.kv_heads, kv_heads)}
    if arch == "opt":
        return found
    return {
        **found,
        "rope.freq_base": (header.rope_base, rope.get("rope_theta", config.get("rope_theta", 1e4))),
        "rope.scaling.factor": (
            header.rope_factor,
            rope.get("factor", 1.0) if kind == "linear" else 1.0,
        ),
    }


def _falcon_kv_heads(config: dict[str, Any], heads: int) -> int:
    """Number of key/value heads: grouped in the new architecture, else one or one per head."""
    if config.get("new_decoder_architecture", config.get("model_type") == "RefinedWeb"):
        return int(config.get("num_kv_heads") or config.get("n_head_kv") or heads)
    return 1 if config.get("multi_query", True) else heads
