"""A model's config read for PowerInfer's file, and the refusal of what the engine cannot express.

The engine loads many of these without a word and computes something else, or fails to load with
"basic_string: construction from null is not valid", so they are refused here, with the reason.
(PowerInfer's llama.cpp at d3ebd7c: `llm_load_hparams`, `build_llama_variants`, `build_falcon`,
`build_opt`.)
"""

from __future__ import annotations

from typing import Any

from sparsecast.core.errors import InputError
from sparsecast.core.models.activations import ActivationRule
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.families import activation_rule, family_of
from sparsecast.export.write.hparams import HParams, check_shape, check_tensors

OPT_POSITIONS = 2048
"""The engine's OPT has 2050 rows of positions, whatever the file says."""
REASONS = {
    "qwen2": "its attention has biases, which the engine's llama has no place for",
    "qwen3": "it normalizes q and k, which the engine's llama does not",
    "granite": (
        "it scales embeddings, residuals and logits as MiniCPM does, which the engine's llama does "
        "not; convert it to LLaMA format, where the scales are part of the weights"
    ),
}
"""Families that are collected and trained for, but that the engine cannot run."""


def read_hyper(checkpoint: Checkpoint, activation_threshold: float | None = None) -> HParams:
    """Read and check a checkpoint's config and its tensors' names and shapes.

    Args:
        activation_threshold: See `activation_rule`.

    Raises:
        InputError: An architecture that PowerInfer has not, or a model that it cannot express.
    """
    config: Any = checkpoint.config
    where = checkpoint.source
    family_of(config, where)
    if config.model_type in REASONS:
        raise InputError(
            f"{where}: model_type is {config.model_type!r}: {REASONS[config.model_type]}"
        )
    rule = activation_rule(config, where, activation_threshold)
    read = {"falcon": _falcon, "opt": _opt}.get(config.model_type, _llama)
    hyper = read(config, rule, where)
    check_shape(hyper, getattr(config, "head_dim", None), where)
    checkpoint.check()
    check_tensors(checkpoint, hyper)
    return hyper


def _llama(config: Any, rule: ActivationRule, where: str) -> HParams:
    """Llama and Mistral; with ReLU on gate and up it is the engine's bamboo."""
    for field in ("attention_bias", "mlp_bias"):
        if getattr(config, field, False):
            raise InputError(
                f"{where}: {field} is true, but the engine's llama knows no biases; such a model "
                "cannot be exported"
            )
    base, factor = _rope(config, where)
    window = getattr(config, "sliding_window", None)
    context = config.max_position_embeddings
    return HParams(
        arch="bamboo" if rule.on_up else "llama",
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        ffn=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads or config.num_attention_heads,
        vocab=config.vocab_size,
        context=context,
        eps=config.rms_norm_eps,
        rope_base=base,
        rope_factor=factor,
        window=window if window is not None and window < context else None,
        tied=config.tie_word_embeddings,
        activation=rule,
    )


def _falcon(config: Any, rule: ActivationRule, where: str) -> HParams:
    if config.alibi or config.bias:
        found = "alibi" if config.alibi else "bias"
        raise InputError(
            f"{where}: {found} is true, but the engine's falcon turns positions into q and k and "
            "knows no biases beside those of norms; such a model cannot be exported"
        )
    base, factor = _rope(config, where)
    if factor != 1.0:
        raise InputError(
            f"{where}: rope type is 'linear', but the engine's falcon divides positions by the "
            "factor twice; such a model cannot be exported"
        )
    grouped = config.new_decoder_architecture
    apart = 1 if config.multi_query else config.num_attention_heads
    norms = config.num_ln_in_parallel_attn or 2
    return HParams(
        arch="falcon",
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        ffn=config.ffn_hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_kv_heads if grouped else apart,
        vocab=config.vocab_size,
        context=config.max_position_embeddings,
        eps=config.layer_norm_epsilon,
        rope_base=base,
        norms=norms if grouped else 1,
        tied=config.tie_word_embeddings,
        activation=rule,
    )


def _opt(config: Any, rule: ActivationRule, where: str) -> HParams:
    wanted = {
        "max_position_embeddings": OPT_POSITIONS,
        "word_embed_proj_dim": config.hidden_size,
        "tie_word_embeddings": True,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "_remove_final_layer_norm": False,
    }
    for field, want in wanted.items():
        if (value := getattr(config, field, want)) != want:
            raise InputError(
                f"{where}: {field} is {value}, but the engine's opt is made for {want} alone; such "
                "a model cannot be exported"
            )
    return HParams(
        arch="opt",
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        ffn=config.ffn_dim,
        heads=config.num_attention_heads,
        kv_heads=config.num_attention_heads,
        vocab=config.vocab_size,
        context=OPT_POSITIONS,
        eps=1e-5,  # torch's own, the config has no field
        tied=True,
        activation=rule,
    )


def _rope(config: Any, where: str) -> tuple[float, float]:
    """(base, linear factor) from transformers 5's rope_parameters or the older spelling."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    base = rope.get("rope_theta") or getattr(config, "rope_theta", None) or 10_000.0
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "linear"):
        raise InputError(
            f"{where}: rope type is {kind!r}, but the engine computes only 'default' and 'linear' "
            "as this model means them; a model with plain positions can be exported"
        )
    if (part := rope.get("partial_rotary_factor", 1.0)) != 1.0:
        raise InputError(
            f"{where}: rope turns {part:g} of each head, but the engine turns whole heads; such a "
            "model cannot be exported"
        )
    return float(base), float(rope.get("factor", 1.0)) if kind == "linear" else 1.0
