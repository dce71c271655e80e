"""Small random models of dense families, as transformers builds them, with SiLU or GELU."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

GATED = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 512,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
HEADS = {**GATED, "head_dim": 8}
GEMMA = {**HEADS, "query_pre_attn_scalar": 8, "sliding_window": 64}
OPT = {
    "hidden_size": 16,
    "ffn_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 128,
    "word_embed_proj_dim": 16,
    "init_std": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
FALCON = {
    "hidden_size": 16,
    "ffn_hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 512,
    "initializer_range": 0.2,
    "alibi": False,
    "bias": False,
    "parallel_attn": True,
    "multi_query": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class Kind(NamedTuple):
    model_type: str
    fields: dict[str, Any]
    act_key: str = "hidden_act"
    """The field that the class reads its activation from."""


KINDS = {
    "llama": Kind("llama", GATED),
    "llama-biased": Kind("llama", {**GATED, "mlp_bias": True, "attention_bias": True}),
    "mistral": Kind("mistral", HEADS),
    "qwen2": Kind("qwen2", GATED),
    "qwen3": Kind("qwen3", HEADS),
    "granite": Kind("granite", {**GATED, "residual_multiplier": 0.5, "logits_scaling": 2.0}),
    "smollm3": Kind("smollm3", GATED),
    "seed_oss": Kind("seed_oss", {**HEADS, "attention_bias": True}),
    "ernie4_5": Kind("ernie4_5", HEADS),
    "olmo": Kind("olmo", GATED),
    "gemma": Kind("gemma", HEADS),
    "gemma2": Kind("gemma2", GEMMA, "hidden_activation"),
    "gemma3_text": Kind("gemma3_text", GEMMA, "hidden_activation"),
    "opt": Kind("opt", {**OPT, "activation_function": "gelu"}, "activation_function"),
    "falcon": Kind("falcon", FALCON, "activation"),
}


def random_model(kind: str, **fields: Any) -> Any:
    """Build a model in float32; its norms and biases are random too."""
    model_type, sizes, _ = KINDS[kind]
    torch.manual_seed(3)
    model: Any = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**{**sizes, **fields}))
    for name, weight in model.named_parameters():
        if "norm" in name or ".ln_" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
        elif name.endswith("bias"):
            torch.nn.init.uniform_(weight, -0.3, 0.3)
    return model


def write_model(folder: Path, tokenizer: Path, kind: str, dtype: str = "float32", **fields) -> Path:
    """Save a random model with the tokenizer of another folder."""
    random_model(kind, **fields).to(getattr(torch, dtype)).save_pretrained(folder)
    for path in tokenizer.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder
