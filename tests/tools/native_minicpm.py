"""A small MiniCPM of the native form, as its publishers save one, and its forward by hand.

Shape letters: S sequence, D hidden, H heads, E head size, F FFN width.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, FFN, LAYERS, HEADS, KV, VOCAB = 64, 1280, 3, 4, 2, 512
SCALES = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 16}
THRESHOLD = 0.03
CONFIG = {
    "architectures": ["MiniCPMForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_minicpm.MiniCPMConfig",
        "AutoModelForCausalLM": "modeling_minicpm.MiniCPMForCausalLM",
    },
    "model_type": "minicpm",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "fatrelu",
    "hidden_act_param": THRESHOLD,
    "hidden_size": HIDDEN,
    "initializer_range": 0.1,
    "intermediate_size": FFN,
    "max_position_embeddings": 256,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KV,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": VOCAB,
    **SCALES,
}


def random_weights(tied: bool, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(11)

    def normal(*shape: int, std: float = 0.1) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * std).to(dtype)

    def norm() -> torch.Tensor:
        return (torch.rand(HIDDEN, generator=generator) + 0.5).to(dtype)

    weights = {"model.embed_tokens.weight": normal(VOCAB, HIDDEN), "model.norm.weight": norm()}
    if not tied:
        weights["lm_head.weight"] = normal(VOCAB, HIDDEN, std=0.3)
    kv = KV * HIDDEN // HEADS
    for i in range(LAYERS):
        shapes = {
            "self_attn.q_proj": (HIDDEN, HIDDEN),
            "self_attn.k_proj": (kv, HIDDEN),
            "self_attn.v_proj": (kv, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN),
            "mlp.gate_proj": (FFN, HIDDEN),
            "mlp.up_proj": (FFN, HIDDEN),
            "mlp.down_proj": (HIDDEN, FFN),
        }
        for name, shape in shapes.items():
            weights[f"model.layers.{i}.{name}.weight"] = normal(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{i}.{name}.weight"] = norm()
    return weights


def minicpm_logits(
    weights: dict[str, torch.Tensor], ids_S: torch.Tensor, threshold: float = THRESHOLD
) -> torch.Tensor:
    """MiniCPM's forward pass in float64 by its formulas, with nothing of transformers or ours."""
    w = {name: weight.double() for name, weight in weights.items()}
    size, length = HIDDEN // HEADS, len(ids_S)
    depth = SCALES["scale_depth"] / math.sqrt(LAYERS)
    inverse = 10_000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angle_SE = torch.arange(length, dtype=torch.float64)[:, None] * inverse
    cos_SE, sin_SE = angle_SE.cos().repeat(1, 2), angle_SE.sin().repeat(1, 2)

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"]

    def rotate(x_HSE):
        first, second = x_HSE.chunk(2, -1)
        return x_HSE * cos_SE + torch.cat([-second, first], -1) * sin_SE

    h_SD = w["model.embed_tokens.weight"][ids_S] * SCALES["scale_emb"]
    for i in range(LAYERS):
        at = f"model.layers.{i}"
        x_SD = norm(h_SD, f"{at}.input_layernorm")
        q, k, v = (
            (x_SD @ w[f"{at}.self_attn.{n}_proj.weight"].T).view(length, -1, size).transpose(0, 1)
            for n in "qkv"
        )
        q, k = rotate(q), rotate(k).repeat_interleave(HEADS // KV, 0)
        scores_HSS = q @ k.mT / math.sqrt(size)
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        mixed = scores_HSS.masked_fill(future, -torch.inf).softmax(-1)
        mixed_SD = (mixed @ v.repeat_interleave(HEADS // KV, 0)).transpose(0, 1).flatten(1)
        h_SD = h_SD + mixed_SD @ w[f"{at}.self_attn.o_proj.weight"].T * depth
        x_SD = norm(h_SD, f"{at}.post_attention_layernorm")
        gate_SF = x_SD @ w[f"{at}.mlp.gate_proj.weight"].T
        x1_SF = torch.where(gate_SF >= threshold, gate_SF, 0)
        x1_SF = x1_SF * (x_SD @ w[f"{at}.mlp.up_proj.weight"].T)
        h_SD = h_SD + x1_SF @ w[f"{at}.mlp.down_proj.weight"].T * depth
    out_SD = norm(h_SD, "model.norm") / (HIDDEN / SCALES["dim_model_base"])
    return out_SD @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T


def save_minicpm(
    folder: Path,
    tokenizer: Path,
    *,
    tied: bool = True,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    **config: object,
) -> dict[str, torch.Tensor]:
    """Save one with the tokenizer of another model's folder, and return its weights.

    Args:
        config: Fields of config.json; one that is `...` is left out.
    """
    folder.mkdir()
    weights = random_weights(tied, dtype)
    if shards == 1:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    else:
        index = {}
        for part in range(shards):
            file = f"model-{part + 1:05}-of-{shards:05}.safetensors"
            mine = sorted(weights)[part::shards]
            save_file({n: weights[n] for n in mine}, folder / file, {"format": "pt"})
            index |= dict.fromkeys(mine, file)
        text = json.dumps({"metadata": {}, "weight_map": index})
        (folder / "model.safetensors.index.json").write_text(text)
    fields = {**CONFIG, **({} if tied else {"tie_word_embeddings": False}), **config}
    fields = {name: value for name, value in fields.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(fields))
    for file in tokenizer.glob("tokenizer*"):
        shutil.copy(file, folder)
    (folder / "generation_config.json").write_text('{"top_p": 0.8, "do_sample": true}')
    return weights
