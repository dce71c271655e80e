"""Small random mixtures of experts with published fields and names, and their forward pass by hand.

The forward pass reads a file's tensors in float64 and nothing of ours or of transformers' modules.

Shape letters: T tokens, D hidden, H heads, C head size, E experts, k experts per token, F FFN
width.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

D, F, LAYERS, HEADS, KV, E, K, VOCAB = 64, 96, 3, 4, 2, 4, 2, 512
MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "num_local_experts": E,
    "num_experts_per_tok": K,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-5,
    "hidden_act": "relu",
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "mixtral": MIXTRAL,
    "turbosparse": MIXTRAL
    | {
        "architectures": ["TurboSparseMixtralForCausalLM"],
        "model_type": "turbosparsemixtral",
        "auto_map": {"AutoModelForCausalLM": "modeling_turbosparsemixtral.TurboSparseMixtral"},
    },
    "smallthinker": {
        "architectures": ["SmallThinkerForCausalLM"],
        "attention_dropout": 0.0,
        "auto_map": {"AutoModelForCausalLM": "modeling_smallthinker.SmallThinkerForCausalLM"},
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
        "head_dim": 16,
        "hidden_size": D,
        "initializer_range": 0.02,
        "max_length": None,
        "max_position_embeddings": 256,
        "model_name": "smallthinker_4b_instruct",
        "model_type": "smallthinker",
        "moe_ffn_hidden_size": F,
        "moe_num_active_primary_experts": K,
        "moe_num_primary_experts": E,
        "moe_primary_router_apply_softmax": False,
        "norm_topk_prob": True,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV,
        "output_router_logits": False,
        "rms_norm_eps": 1e-6,
        "rope_layout": [1, 0, 1],
        "rope_scaling": None,
        "rope_theta": 1.5e6,
        "sliding_window_size": 9,
        "sliding_window_layout": [0, 0, 1],
        "temperature": None,
        "tie_word_embeddings": True,
        "tokenizer_class": "Qwen2Tokenizer",
        "torch_dtype": "float32",
        "use_cache": False,
        "vocab_size": VOCAB,
    },
}
CONFIGS["smallthinker-softmax"] = {
    name: value
    for name, value in (
        CONFIGS["smallthinker"] | {"moe_primary_router_apply_softmax": True}
    ).items()
    if name != "model_type"  # as the 21B's config
}
NAMES = list(CONFIGS)


def write_mixture(folder: Path, name: str, tokenizer: Path, **fields: object) -> Path:
    """Write a model with its own config, `fields` over it, and the tokenizer of another folder."""
    folder.mkdir(parents=True)
    config = CONFIGS[name] | fields
    torch.manual_seed(5)
    save_file(_tensors(config), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    for file in tokenizer.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def _tensors(config: dict) -> dict[str, torch.Tensor]:
    def randn(*size: int) -> torch.Tensor:
        return torch.randn(*size) * size[-1] ** -0.5

    made = {"model.embed_tokens.weight": torch.randn(VOCAB, D), "model.norm.weight": _norm()}
    if not config["tie_word_embeddings"]:
        made["lm_head.weight"] = randn(VOCAB, D)
    for i in range(LAYERS):
        at, moe = f"model.layers.{i}.", f"model.layers.{i}.block_sparse_moe."
        made[f"{at}input_layernorm.weight"] = _norm()
        made[f"{at}post_attention_layernorm.weight"] = _norm()
        for part, rows in (("q", HEADS), ("k", KV), ("v", KV)):
            made[f"{at}self_attn.{part}_proj.weight"] = randn(rows * D // HEADS, D)
        made[f"{at}self_attn.o_proj.weight"] = randn(D, D)
        router, gate, up, down = names_of(config)
        made[f"{moe}{router}.weight"] = 3 * randn(config_experts(config), D)
        for e in range(config_experts(config)):
            made[f"{moe}experts.{e}.{gate}.weight"] = 3 * randn(F, 8) @ randn(8, D)
            made[f"{moe}experts.{e}.{up}.weight"] = randn(F, D)
            made[f"{moe}experts.{e}.{down}.weight"] = randn(D, F)
        if config.get("model_type") == "turbosparsemixtral":  # keeps its predictors beside the FFN
            made[f"{moe}experts.0.predictor.fc1.weight"] = torch.zeros(8, D)
    return made


def config_experts(config: dict) -> int:
    return config.get("num_local_experts") or config["moe_num_primary_experts"]


def names_of(config: dict) -> tuple[str, str, str, str]:
    """Names of router, gate, up and down."""
    if "moe_num_primary_experts" in config:
        return "primary_router", "gate", "up", "down"
    return "gate", "w1", "w3", "w2"


def _norm() -> torch.Tensor:
    return 0.5 + torch.rand(D)  # a norm of ones would hide a missing one


class Layer(NamedTuple):
    """What one layer computes, float64."""

    x_TD: torch.Tensor
    """The residual stream before the FFN norm."""
    chosen_Tk: torch.Tensor
    edge_TkF: torch.Tensor
    """How far each neuron is from the edge of its activation; it fires above 0."""
    x1_TkF: torch.Tensor


def forward(folder: Path, ids: list[int], select=None) -> tuple[torch.Tensor, list[Layer]]:
    """Logits (T, V) of one document, and what each layer computes.

    Args:
        select: (layer, expert, x (D,)) to the neurons (F,) that are computed; all unless given.
    """
    config = json.loads((folder / "config.json").read_text())
    w = {name: value.double() for name, value in load_file(folder / "model.safetensors").items()}
    h_TD, layers = w["model.embed_tokens.weight"][ids], []
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        own = {name.removeprefix(at): value for name, value in w.items() if name.startswith(at)}
        before_TD = h_TD
        h_TD = h_TD + attention(rms(h_TD, own["input_layernorm.weight"], config), own, config, i)
        keep = None if select is None else partial(select, i)
        layer, out_TD = experts(h_TD, before_TD, own, config, keep)
        layers.append(layer)
        h_TD = h_TD + out_TD
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return rms(h_TD, w["model.norm.weight"], config) @ head.T, layers


def rms(x_TD, weight_D, config):
    return x_TD / (x_TD.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt() * weight_D


def attention(x_TD, own, config, i):
    tokens, size = len(x_TD), D // HEADS
    q, k, v = (
        (x_TD @ own[f"self_attn.{part}_proj.weight"].T).view(tokens, -1, size).transpose(0, 1)
        for part in "qkv"
    )
    if config.get("rope_layout", [1] * LAYERS)[i]:
        q, k = rotated(q, config), rotated(k, config)
    k, v = (t.repeat_interleave(HEADS // KV, 0) for t in (k, v))
    place = torch.arange(tokens)
    seen = place[None] <= place[:, None]
    if config.get("sliding_window_layout", [0] * LAYERS)[i]:
        seen &= place[:, None] - place[None] < config["sliding_window_size"]
    scores = (q @ k.transpose(1, 2) / size**0.5).masked_fill(~seen, -torch.inf)
    mixed = (scores.softmax(-1) @ v).transpose(0, 1).reshape(tokens, D)
    return mixed @ own["self_attn.o_proj.weight"].T


def rotated(q_HTC, config):
    """Rotate pair (c, c + C/2) of place t by t theta^(-2c/C)."""
    half = q_HTC.shape[-1] // 2
    speed = config["rope_theta"] ** (-torch.arange(half).double() / half)
    angle = torch.arange(q_HTC.shape[1]).double()[:, None] * speed
    a, b = q_HTC[..., :half], q_HTC[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def experts(h_TD, before_TD, own, config, keep=None):
    router, gate, up, down = names_of(config)
    own = {name.removeprefix("block_sparse_moe."): value for name, value in own.items()}
    x_TD = rms(h_TD, own["post_attention_layernorm.weight"], config)
    small = "moe_num_primary_experts" in config
    logits_TE = (before_TD if small else x_TD) @ own[f"{router}.weight"].T
    top_Tk, chosen_Tk = logits_TE.topk(K, -1)
    if small and not config["moe_primary_router_apply_softmax"]:
        weight_Tk = 1 / (1 + torch.exp(-top_Tk))
        weight_Tk = weight_Tk / weight_Tk.sum(-1, keepdim=True)
    else:  # a softmax over all experts, divided by its sum over the chosen, is one over those
        weight_Tk = top_Tk.softmax(-1)
    out_TD = torch.zeros_like(h_TD)
    edge_TkF, x1_TkF = (torch.zeros(len(h_TD), K, F, dtype=torch.float64) for _ in range(2))
    for t, row in enumerate(chosen_Tk.tolist()):
        for slot, e in enumerate(row):
            g = own[f"experts.{e}.{gate}.weight"] @ x_TD[t]
            u = own[f"experts.{e}.{up}.weight"] @ x_TD[t]
            drelu = config.get("model_type") == "turbosparsemixtral"
            edge_TkF[t, slot] = torch.minimum(g, u) if drelu else g
            x1_TkF[t, slot] = g.clamp_min(0) * (u.clamp_min(0) if drelu else u)
            x1 = x1_TkF[t, slot] if keep is None else x1_TkF[t, slot] * keep(e, h_TD[t])
            y = own[f"experts.{e}.{down}.weight"] @ x1
            out_TD[t] += weight_Tk[t, slot] * y
    return Layer(h_TD, chosen_Tk, edge_TkF, x1_TkF), out_TD
