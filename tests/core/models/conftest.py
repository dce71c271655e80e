"""One small random model per family, as folders with the fields and names that are published."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

GATED = {
    "hidden_size": 64,
    "intermediate_size": 136,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "rms_norm_eps": 1e-5,
    "hidden_act": "relu",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FALCON = {
    "hidden_size": 64,
    "ffn_hidden_size": 200,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 512,
    "initializer_range": 0.1,
    "activation": "relu",
    "alibi": False,
    "bias": False,
    "parallel_attn": True,
    "bos_token_id": 11,
    "eos_token_id": 11,
}
REMOTE = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XModel"}


def _opt():
    return OPTForCausalLM(
        OPTConfig(
            hidden_size=64,
            ffn_dim=200,
            num_hidden_layers=3,
            num_attention_heads=4,
            vocab_size=512,
            max_position_embeddings=256,
            word_embed_proj_dim=64,
            init_std=0.1,
            activation_function="relu",
            bos_token_id=2,
            pad_token_id=1,
        )
    )


def _fatrelu(config):
    config.hidden_act, config.hidden_act_param = "fatrelu", 0.2
    return LlamaForCausalLM(config)


SQUARED = {
    "arcee": {
        "architectures": ["ArceeForCausalLM"],
        "attention_bias": False,
        "head_dim": 16,
        "mlp_bias": False,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 2.0,
            "original_max_position_embeddings": 128,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
        },
    },
    "nemotron": {
        "architectures": ["NemotronForCausalLM"],
        "head_dim": 16,
        "norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "rope_theta": 10000,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "jais2": {
        "architectures": ["Jais2ForCausalLM"],
        "attention_bias": True,
        "mlp_bias": True,
        "layer_norm_eps": 1e-5,
        "num_key_value_heads": 4,
        "rope_theta": 500000.0,
        "rope_scaling": None,
    },
    "nanochat": {
        "architectures": ["NanoChatForCausalLM"],
        "attention_bias": False,
        "rms_norm_eps": 1e-6,
        "final_logit_softcapping": 15.0,
        "num_key_value_heads": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "persimmon": {
        "architectures": ["PersimmonForCausalLM"],
        "num_key_value_heads": 4,
        "hidden_dropout": 0.6,
        "attention_dropout": 0.0,
        "layer_norm_eps": 1e-5,
        "qk_layernorm": True,
        "rope_theta": 25000.0,
        "rope_scaling": None,
    },
    "bitnet": {
        "architectures": ["BitNetForCausalLM"],
        "auto_map": REMOTE,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    },
}
SQUARED["bitnet-online"] = SQUARED["bitnet"] | {
    "torch_dtype": "bfloat16",
    "quantization_config": {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "online",
    },
}
"""Families with ReLU²: the fields of AFM-4.5B, Minitron, Jais-2, nanochat, Persimmon-8B, BitNet
without and with its quantization."""


def squared_config(name: str) -> dict:
    """config.json of a family with ReLU²."""
    common = {"tie_word_embeddings": False, "torch_dtype": "float32", "use_cache": True}
    kind = {"model_type": name.partition("-")[0], "hidden_act": "relu2"}
    return {**GATED, **common, **kind, **SQUARED[name]}


def _squared(name: str):
    raw = squared_config(name)
    raw.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[raw["model_type"]].from_dict(raw))
    return model.to(getattr(torch, raw["torch_dtype"]))


GEMMA2 = {"head_dim": 16, "hidden_activation": "relu", "query_pre_attn_scalar": 16}
ROWS = {
    "ernie4_5": {"head_dim": 16},
    "olmo": {"clip_qkv": None},
    "seed_oss": {"head_dim": 16, "attention_bias": True},
    "smollm3": {"no_rope_layer_interval": 2, "pad_token_id": None},
    "gemma": {"head_dim": 16},
    "gemma2": {**GEMMA2, "sliding_window": 64},
    "gemma3_text": {**GEMMA2, "sliding_window": 64},
}
"""Families with Llama's names, or all but one of them, that are built from their config alone."""


def _row(name: str):
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**GATED | ROWS[name]))


NATIVE = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GATED)),
    "llama-fatrelu": lambda: _fatrelu(LlamaConfig(**GATED)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**GATED)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**GATED)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**GATED, head_dim=16)),
    "opt": _opt,
    "falcon-7b": lambda: FalconForCausalLM(FalconConfig(**FALCON, multi_query=True)),
    "falcon-40b": lambda: FalconForCausalLM(
        FalconConfig(**FALCON, new_decoder_architecture=True, num_kv_heads=2)
    ),
}
"""Families with a class in transformers."""

FOREIGN = {
    "sparsellama": {
        "architectures": ["SparseLlamaForCausalLM"],
        "model_type": "sparsellama",
        "auto_map": REMOTE,
        "hidden_act": "fatrelu",
        "hidden_act_param": 0.2,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "torch_dtype": "float32",
        "tie_word_embeddings": False,
    },
    "bamboo": {
        "architectures": ["BambooForCausalLM"],
        "model_type": "bamboo",
        "auto_map": REMOTE,
        "sliding_window": 4096,
        "rope_theta": 10000.0,
        "torch_dtype": "float32",
        "tie_word_embeddings": False,
    },
    "minicpm": {
        "architectures": ["MiniCPMForCausalLM"],
        "model_type": "minicpm",
        "auto_map": REMOTE,
        "hidden_act": "fatrelu",
        "hidden_act_param": 0.2,
        "scale_emb": 12,
        "scale_depth": 1.4,
        "dim_model_base": 16,
        "rope_scaling": None,
        "torch_dtype": "float32",
    },
}
"""Families that the hub serves with remote code; tensors have Llama's names."""


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory, model_folder):
    """Family's name to a saved model with the tokenizer of `model_folder`."""
    root = tmp_path_factory.mktemp("families")

    def folder(name: str) -> Path:
        path = root / name
        if path.exists():
            return path
        torch.manual_seed(3)
        if name in SQUARED:
            model = _squared(name)
        elif name in ROWS:
            model = _row(name)
        else:
            model = NATIVE["llama" if name in FOREIGN else name]()
        for key, weight in model.named_parameters():
            if "norm" in key or ".ln_" in key:  # a norm of ones would hide a missing one
                torch.nn.init.uniform_(weight, 0.5, 1.5)
            elif key.endswith("bias"):
                torch.nn.init.uniform_(weight, -0.3, 0.3)
        model.save_pretrained(path)
        for file in model_folder.glob("tokenizer*"):
            shutil.copy(file, path)
        if name in SQUARED:
            (path / "config.json").write_text(json.dumps(squared_config(name)))
        if name in FOREIGN:
            config = {**GATED, "use_cache": True, "attention_bias": False, **FOREIGN[name]}
            (path / "config.json").write_text(json.dumps(config))
            weights = load_file(path / "model.safetensors")
            if name == "minicpm":  # tied
                weights.pop("lm_head.weight")
            if name == "bamboo":  # TurboSparse keeps its predictors beside the FFN
                weights["model.layers.0.mlp.predictor.fc1.weight"] = torch.zeros(8, 64)
            save_file(weights, path / "model.safetensors", {"format": "pt"})
        return path

    return folder


@pytest.fixture
def folder(model_folder, tmp_path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "m"))
