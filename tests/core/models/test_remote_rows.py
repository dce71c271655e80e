"""sparsing-law and SparseLM with their published fields, against a forward pass written by hand.

The oracle reads the checkpoint's tensors in float64 and nothing of ours or of transformers'.

Shape letters: T tokens, D hidden, F FFN width, H heads, E head size, V vocabulary.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sparsecast.core.errors import InputError
from sparsecast.core.models.families import activation_rule, family_of
from sparsecast.core.models.loading import load_model, open_model
from sparsecast.core.models.recorder import Recorder

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 136,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
SPARSING_LAW = {
    "_name_or_path": "openbmb/CPM-2B",
    "architectures": ["MiniCPMForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_minicpm.MiniCPMConfig",
        "AutoModel": "modeling_minicpm.MiniCPMModel",
        "AutoModelForCausalLM": "modeling_minicpm.MiniCPMForCausalLM",
        "AutoModelForSeq2SeqLM": "modeling_minicpm.MiniCPMForCausalLM",
        "AutoModelForSequenceClassification": "modeling_minicpm.MiniCPMForSequenceClassification",
    },
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "relu",
    "initializer_range": 0.1,
    "rope_scaling": None,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0",
    "use_cache": True,
    "scale_emb": 12,
    "dim_model_base": 16,
    "scale_depth": 1.4,
}
SPARSE_LM = {
    "architectures": ["SparseLlamaForCausalLM"],
    "auto_map": {
        "AutoConfig": "sparse_models.SparseLlamaConfig",
        "AutoModelForCausalLM": "sparse_models.SparseLlamaForCausalLM",
    },
    "model_type": "llama_sparse_relu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "is_llama_config": True,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "sparsity_gated_mlp": True,
    "sparsity_l1_coeff": 2e-05,
    "sparsity_max_seq_length": 2048,
    "sparsity_mlp_execution_logic": "training",
    "sparsity_new_intermediate_size": 136,
    "sparsity_reinitialize": True,
    "sparsity_tokens_until_dead": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
RAW = {
    "sparsing-law": SPARSING_LAW,
    "SparseLM": SPARSE_LM,
    "SparseLM-ungated": {**SPARSE_LM, "sparsity_gated_mlp": False},
}


@pytest.fixture
def published(tmp_path, model_folder):
    """Write the folder of one of `RAW`: (name, changed fields) to the folder and its tensors."""

    def make(name: str, **fields: object) -> tuple[Path, dict[str, torch.Tensor]]:
        folder = tmp_path / "published"
        folder.mkdir()
        for file in model_folder.glob("tokenizer*"):
            shutil.copy(file, folder)
        raw = {**SIZES, **RAW[name], **fields}
        (folder / "config.json").write_text(json.dumps(raw))
        weights = tensors(gated=raw.get("sparsity_gated_mlp", True))
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return folder, weights

    return make


def tensors(gated: bool) -> dict[str, torch.Tensor]:
    """A Llama's tensors of random numbers, its embeddings tied."""
    made = torch.Generator().manual_seed(5)
    width, ffn = SIZES["hidden_size"], SIZES["intermediate_size"]
    shapes = {"mlp.up_proj": (ffn, width), "mlp.down_proj": (width, ffn)}
    shapes |= {f"self_attn.{name}_proj": (width, width) for name in "qkvo"}
    if gated:
        shapes["mlp.gate_proj"] = (ffn, width)
    found = {"model.embed_tokens.weight": 0.3 * torch.randn(512, width, generator=made)}
    norms = ["model.norm.weight"]
    for layer in range(SIZES["num_hidden_layers"]):
        for name, shape in shapes.items():
            weight = torch.randn(shape, generator=made) / math.sqrt(shape[1])
            found[f"model.layers.{layer}.{name}.weight"] = weight
        for name in ("input_layernorm", "post_attention_layernorm"):
            norms.append(f"model.layers.{layer}.{name}.weight")
    return found | {name: 0.5 + torch.rand(width, generator=made) for name in norms}


def rms_norm(x_TD, weight_D):
    return x_TD / (x_TD.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight_D


def rotated(x_THE, theta: float):
    tokens, _, size = x_THE.shape
    turns = theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angle = torch.arange(tokens, dtype=torch.float64)[:, None] * turns
    cos, sin = (torch.cat([f(angle)] * 2, -1)[:, None] for f in (torch.cos, torch.sin))
    left, right = x_THE.chunk(2, -1)
    return x_THE * cos + torch.cat([-right, left], -1) * sin


def by_hand(raw: dict, weights: dict, ids_T: torch.Tensor):
    """(predictor inputs (T, D) and x1 (T, F) of each layer, logits (T, V)) of one document."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    heads, width = SIZES["num_attention_heads"], SIZES["hidden_size"]
    size, tokens = width // heads, len(ids_T)
    depth = raw.get("scale_depth", math.sqrt(2)) / math.sqrt(SIZES["num_hidden_layers"])
    x_TD = w["model.embed_tokens.weight"][ids_T] * raw.get("scale_emb", 1)
    hidden = torch.full((tokens, tokens), -torch.inf, dtype=torch.float64).triu(1)
    seen = []
    for layer in range(SIZES["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        normed = rms_norm(x_TD, w[f"{at}input_layernorm.weight"])
        q, k, v = (
            (normed @ w[f"{at}self_attn.{name}_proj.weight"].T).view(tokens, heads, size)
            for name in "qkv"
        )
        q, k = (rotated(each, raw.get("rope_theta", 10_000.0)) for each in (q, k))
        scores = torch.einsum("ihe,jhe->hij", q, k) / math.sqrt(size) + hidden
        mixed = torch.einsum("hij,jhe->ihe", scores.softmax(-1), v).reshape(tokens, width)
        x_TD = x_TD + depth * (mixed @ w[f"{at}self_attn.o_proj.weight"].T)
        normed = rms_norm(x_TD, w[f"{at}post_attention_layernorm.weight"])
        x1_TF = normed @ w[f"{at}mlp.up_proj.weight"].T
        gated = f"{at}mlp.gate_proj.weight" in w
        if gated:
            x1_TF = (normed @ w[f"{at}mlp.gate_proj.weight"].T).clamp_min(0) * x1_TF
        else:
            x1_TF = x1_TF.clamp_min(0)
        seen.append((x_TD, x1_TF))
        x_TD = x_TD + depth * (x1_TF @ w[f"{at}mlp.down_proj.weight"].T)
    out = rms_norm(x_TD, w["model.norm.weight"]) @ w["model.embed_tokens.weight"].T
    return seen, out / (width / raw["dim_model_base"] if "dim_model_base" in raw else 1)


@pytest.mark.parametrize("name", RAW)
def test_a_published_config_computes_what_its_own_code_would(name, published):
    folder, weights = published(name)
    model, _ = load_model(str(folder), device="cpu")
    ids_T = torch.randint(3, 512, (48,))
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    with torch.inference_mode(), Recorder(model, lambda _, x, x1: seen.append((x, x1.clone()))):
        logits_TV = model(ids_T[None]).logits[0]

    wanted, out_TV = by_hand(RAW[name], weights, ids_T)
    assert (logits_TV - out_TV).abs().max() < 1e-4 * out_TV.abs().max()
    for (x_TD, x1_TF), (want_TD, want_TF) in zip(seen, wanted, strict=True):
        torch.testing.assert_close(x_TD, want_TD.float(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(x1_TF, want_TF.float(), rtol=1e-4, atol=1e-4)
        different = (x1_TF != 0) != (want_TF != 0)
        assert different.float().mean() < 1e-3
        assert 0.3 < (x1_TF == 0).float().mean() < 0.7
    assert activation_rule(model.config, name).name == "relu"
    assert family_of(model.config, name).matrices == (2 if name == "SparseLM-ungated" else 3)


@pytest.mark.parametrize(
    ("fields", "told"), [({}, "config.json says 'silu'"), ({"hidden_act": "relu"}, "")]
)
def test_an_activation_that_the_code_ignores_is_told(fields, told, published, capsys):
    folder, _ = published("SparseLM", **fields)
    load_model(str(folder), device="cpu")
    text = " ".join(capsys.readouterr().err.split())
    assert ("whatever it says; relu is used" in text) == bool(told)
    assert told in text


def test_the_ffn_width_of_a_sparse_lm_is_its_own(published):
    """Its code builds the FFN with it, and leaves intermediate_size as the base model had it."""
    folder, _ = published("SparseLM", intermediate_size=99)
    checkpoint, _ = open_model(str(folder))
    assert checkpoint.config.intermediate_size == 136


@pytest.mark.parametrize("width", [0, -1, 2.5, "136", True])
def test_an_impossible_ffn_width_is_named(width, published):
    folder, _ = published("SparseLM", sparsity_new_intermediate_size=width)
    with pytest.raises(InputError, match="sparsity_new_intermediate_size is"):
        open_model(str(folder))


def test_minicpms_code_with_silu_is_refused_with_what_to_do(published):
    folder, _ = published("sparsing-law", hidden_act="silu")
    with pytest.raises(InputError, match=r"hidden_act is 'silu', which leaves.*sparsecast spars"):
        load_model(str(folder), device="cpu")
