"""Compute from a model what each tensor of its PowerInfer file should hold.

Written without the exporter's code: where export/write/tensor_map.py moves axes, this picks
rows by index arithmetic, and it reads config.json itself instead of transformers' object.

The engine's llama has no scales. Those of a MiniCPM (arXiv 2404.06395) and of a Granite must be in
the weights: multiplied, rounded to float32, and then to the type of the file.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from torch import Tensor

from sparsecast.core.files import read_json
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.export.read.header import header_of
from sparsecast.export.read.reader import GGUFFile, TensorType

LLAMA = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "model.layers.{}.input_layernorm",
    "attn_q": "model.layers.{}.self_attn.q_proj",
    "attn_k": "model.layers.{}.self_attn.k_proj",
    "attn_v": "model.layers.{}.self_attn.v_proj",
    "attn_output": "model.layers.{}.self_attn.o_proj",
    "ffn_norm": "model.layers.{}.post_attention_layernorm",
    "ffn_gate": "model.layers.{}.mlp.gate_proj",
    "ffn_up": "model.layers.{}.mlp.up_proj",
    "ffn_down_t": "model.layers.{}.mlp.down_proj",
}
FALCON = {
    "token_embd": "transformer.word_embeddings",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    "attn_norm": "transformer.h.{}.input_layernorm",
    "attn_qkv": "transformer.h.{}.self_attention.query_key_value",
    "attn_output": "transformer.h.{}.self_attention.dense",
    "ffn_up": "transformer.h.{}.mlp.dense_h_to_4h",
    "ffn_down_t": "transformer.h.{}.mlp.dense_4h_to_h",
}
TWO_NORMS = {
    "attn_norm": "transformer.h.{}.ln_mlp",
    "attn_norm_2": "transformer.h.{}.ln_attn",
}
OPT = {
    "token_embd": "model.decoder.embed_tokens",
    "position_embd": "model.decoder.embed_positions",
    "output_norm": "model.decoder.final_layer_norm",
    "attn_norm": "model.decoder.layers.{}.self_attn_layer_norm",
    "attn_q": "model.decoder.layers.{}.self_attn.q_proj",
    "attn_k": "model.decoder.layers.{}.self_attn.k_proj",
    "attn_v": "model.decoder.layers.{}.self_attn.v_proj",
    "attn_output": "model.decoder.layers.{}.self_attn.out_proj",
    "ffn_norm": "model.decoder.layers.{}.final_layer_norm",
    "ffn_up": "model.decoder.layers.{}.fc1",
    "ffn_down_t": "model.decoder.layers.{}.fc2",
}


def modules(file: GGUFFile) -> dict[str, str]:
    """Map kinds of the file's tensors to the model's modules; `{}` stands for the layer."""
    arch = header_of(file).arch
    if arch == "falcon" and "blk.0.attn_norm_2.weight" in file.entries:
        return {**FALCON, **TWO_NORMS}
    return {"falcon": FALCON, "opt": OPT}.get(arch, LLAMA)


def module_of(file: GGUFFile, name: str) -> str | None:
    """Name the model's module whose weight or bias a tensor holds; None for a predictor."""
    block, kind = parts(name)
    module = modules(file).get(kind)
    return None if module is None else module.format(block)


def parts(name: str) -> tuple[int | None, str]:
    """Split a tensor's name into layer and kind: blk.3.attn_q.weight is (3, "attn_q")."""
    split = name.split(".")
    return (int(split[1]), split[2]) if split[0] == "blk" else (None, split[0])


MINICPM = "MiniCPMForCausalLM"


def factors(config: dict[str, Any]) -> dict[str, float]:
    """Return what a llama's weights have more than the model's, by kind of the file's tensor.

    Args:
        config: config.json; only a MiniCPM and a Granite have factors.
    """
    kind = config.get("model_type") or (config.get("architectures") or [""])[0]
    hidden = config.get("hidden_size", 0)
    if kind in ("minicpm", MINICPM):
        depth = config["scale_depth"] / math.sqrt(config["num_hidden_layers"])
        widening = hidden / config["dim_model_base"]
        return {
            "token_embd": float(config["scale_emb"]),
            "attn_output": depth,
            "ffn_down_t": depth,
            "output": 1 / widening,
        }
    if kind not in ("granite", "GraniteForCausalLM"):
        return {}
    size = config.get("head_dim") or hidden // config["num_attention_heads"]
    # The engine multiplies scores by size^-0.5 whatever the model does.
    scores = config.get("attention_multiplier", 1.0) * math.sqrt(size)
    return {
        "token_embd": float(config.get("embedding_multiplier", 1.0)),
        "attn_q": 1.0 if math.isclose(scores, 1.0) else scores,
        "attn_output": float(config.get("residual_multiplier", 1.0)),
        "ffn_down_t": float(config.get("residual_multiplier", 1.0)),
        "output": 1 / config.get("logits_scaling", 1.0),
    }


def ties(config: dict[str, Any], arch: str) -> bool:
    """Return whether the head is the embedding. Where the field is absent, it is in some families:
    a llama's config omits it where it is false, a falcon's and a MiniCPM's where it is true."""
    kind = config.get("model_type") or (config.get("architectures") or [""])[0]
    return bool(config.get("tie_word_embeddings", arch == "falcon" or kind in ("minicpm", MINICPM)))


class Source:
    """The model's tensors under the names of the file."""

    def __init__(self, checkpoint: Checkpoint, file: GGUFFile) -> None:
        self.checkpoint = checkpoint
        self.file = file
        self.config = read_json(checkpoint.folder / "config.json", "the model's config")
        self.header = header_of(file)
        self.factors = factors(self.config)

    def raw(self, name: str) -> Tensor:
        """Read the model's tensor as the checkpoint stores it, times its factor if it has one."""
        stored, factor = name, self.factors.get(parts(name)[1], 1.0)
        if name == "output.weight" and ties(self.config, self.header.arch):
            stored = "token_embd.weight"
        module = module_of(self.file, stored)
        weight = self.checkpoint.tensor(f"{module}.{stored.rpartition('.')[2]}")
        return weight if factor == 1.0 else (weight.double() * factor).float()

    def interleaved(self, name: str) -> bool:
        """Whether the rows are q or k rows in the engine's order."""
        rotates_pairs = self.header.arch in ("llama", "bamboo")
        return rotates_pairs and parts(name)[1] in ("attn_q", "attn_k")

    def arranged(self, name: str) -> Tensor:
        """Arrange rows and columns as in the file, in the model's dtype."""
        raw, kind = self.raw(name), parts(name)[1]
        if name.endswith(".ffn_down_t.weight"):
            return raw.t()
        if self.interleaved(name):
            heads = self.header.heads if kind == "attn_q" else self.header.kv_heads
            return raw[interleaved_rows(len(raw), heads)]
        if kind == "attn_qkv":
            return raw[fused_rows(len(raw), self.header.heads, self.header.kv_heads)]
        return raw

    def expected(self, name: str) -> Tensor:
        """Compute what the reader should return for the tensor, see `rounded`."""
        return rounded(self.arranged(name), self.file.entries[name].type)


def rounded(values: Tensor, kind: TensorType) -> Tensor:
    """Round `values` to a type of the file: in its dtype, or float32 if it is quantized."""
    if kind.block == 1:
        return values.float().to(kind.dtype)
    type_ = GGMLQuantizationType[kind.name.upper()]
    packed = quantize(values.float().contiguous().numpy(), type_)
    return torch.from_numpy(dequantize(packed, type_)).view(values.shape)


def interleaved_rows(rows: int, heads: int) -> Tensor:
    """Return the model's row for each row of the file: 2 j is j, 2 j + 1 is j + size / 2."""
    size = rows // heads
    row = torch.arange(rows)
    head, within = row // size, row % size
    return head * size + within // 2 + (within % 2) * (size // 2)


def fused_rows(rows: int, heads: int, kv_heads: int) -> Tensor:
    """Return the model's row for each row of a falcon's attn_qkv.

    The file's n-th head is a query (n < heads), a key or a value. In the model every key/value head
    is a group: its queries, its key, its value.
    """
    size, queries = rows // (heads + 2 * kv_heads), heads // kv_heads
    row = torch.arange(rows)
    head, within = row // size, row % size
    key, value = head - heads, head - heads - kv_heads
    group = torch.where(key < 0, head // queries, torch.where(value < 0, key, value))
    place = torch.where(key < 0, head % queries, torch.where(value < 0, queries, queries + 1))
    return (group * (queries + 2) + place) * size + within
