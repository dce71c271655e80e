"""Map each tensor of a checkpoint to its name and layout in PowerInfer's file.

Names are those of PowerInfer's llama.cpp (`LLM_TENSOR_NAMES`; `llm_load_sparse_model_tensors` lists
those of an architecture). The down projection is stored transposed, one row per neuron. In a llama,
transformers rotates the two halves of a head against each other and the engine rotates neighbors,
so the rows of q and k are interleaved head by head; in a falcon both rotate halves. A falcon's
fused projection holds, per key/value head, its query heads, then the key, then the value; the
engine expects all queries, then all keys, then all values.

Shape letters: V vocabulary, P positions, D hidden, K key/value width, Q = D + 2 K, F FFN width,
R predictor rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

ARCHITECTURES = ("llama", "bamboo", "falcon", "opt")


class Layout(Enum):
    """How rows and columns are rearranged for the file."""

    PLAIN = "plain"
    TRANSPOSED = "transposed"
    QUERY = "interleaved per query head"
    KEY = "interleaved per key/value head"
    FUSED = "queries, keys and values split"


class Row(NamedTuple):
    """One tensor of the file and its source; `{i}` in the names stands for the layer."""

    target: str
    source: str
    shape: str
    """Shape of the source, in shape letters."""
    layout: Layout = Layout.PLAIN


def _with_bias(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """Add a row for the bias after each row."""
    return tuple(
        both
        for row in rows
        for both in (
            row,
            Row(
                row.target.removesuffix("weight") + "bias",
                row.source.removesuffix("weight") + "bias",
                row.shape[0],
            ),
        )
    )


_LLAMA = (
    Row("token_embd.weight", "model.embed_tokens.weight", "VD"),
    Row("output_norm.weight", "model.norm.weight", "D"),
    Row("output.weight", "lm_head.weight", "VD"),
)
_LLAMA_LAYER = (
    Row("blk.{i}.attn_norm.weight", "model.layers.{i}.input_layernorm.weight", "D"),
    Row("blk.{i}.attn_q.weight", "model.layers.{i}.self_attn.q_proj.weight", "DD", Layout.QUERY),
    Row("blk.{i}.attn_k.weight", "model.layers.{i}.self_attn.k_proj.weight", "KD", Layout.KEY),
    Row("blk.{i}.attn_v.weight", "model.layers.{i}.self_attn.v_proj.weight", "KD"),
    Row("blk.{i}.attn_output.weight", "model.layers.{i}.self_attn.o_proj.weight", "DD"),
    Row("blk.{i}.ffn_norm.weight", "model.layers.{i}.post_attention_layernorm.weight", "D"),
    Row("blk.{i}.ffn_gate.weight", "model.layers.{i}.mlp.gate_proj.weight", "FD"),
    Row("blk.{i}.ffn_up.weight", "model.layers.{i}.mlp.up_proj.weight", "FD"),
    Row(
        "blk.{i}.ffn_down_t.weight",
        "model.layers.{i}.mlp.down_proj.weight",
        "DF",
        Layout.TRANSPOSED,
    ),
)
_FALCON = (
    Row("token_embd.weight", "transformer.word_embeddings.weight", "VD"),
    *_with_bias((Row("output_norm.weight", "transformer.ln_f.weight", "D"),)),
    Row("output.weight", "lm_head.weight", "VD"),
)
_FALCON_NORMS = {
    1: _with_bias(
        (Row("blk.{i}.attn_norm.weight", "transformer.h.{i}.input_layernorm.weight", "D"),)
    ),
    2: _with_bias(
        (
            Row("blk.{i}.attn_norm.weight", "transformer.h.{i}.ln_mlp.weight", "D"),
            Row("blk.{i}.attn_norm_2.weight", "transformer.h.{i}.ln_attn.weight", "D"),
        )
    ),
}
"""By norms per layer: attn_norm feeds the FFN, and attention unless that has a norm of its own."""
_FALCON_LAYER = (
    Row(
        "blk.{i}.attn_qkv.weight",
        "transformer.h.{i}.self_attention.query_key_value.weight",
        "QD",
        Layout.FUSED,
    ),
    Row("blk.{i}.attn_output.weight", "transformer.h.{i}.self_attention.dense.weight", "DD"),
    Row("blk.{i}.ffn_up.weight", "transformer.h.{i}.mlp.dense_h_to_4h.weight", "FD"),
    Row(
        "blk.{i}.ffn_down_t.weight",
        "transformer.h.{i}.mlp.dense_4h_to_h.weight",
        "DF",
        Layout.TRANSPOSED,
    ),
)
_OPT = (
    Row("token_embd.weight", "model.decoder.embed_tokens.weight", "VD"),
    Row("position_embd.weight", "model.decoder.embed_positions.weight", "PD"),
    *_with_bias((Row("output_norm.weight", "model.decoder.final_layer_norm.weight", "D"),)),
)
_OPT_LAYER = _with_bias(
    (
        Row(
            "blk.{i}.attn_norm.weight", "model.decoder.layers.{i}.self_attn_layer_norm.weight", "D"
        ),
        Row("blk.{i}.attn_q.weight", "model.decoder.layers.{i}.self_attn.q_proj.weight", "DD"),
        Row("blk.{i}.attn_k.weight", "model.decoder.layers.{i}.self_attn.k_proj.weight", "DD"),
        Row("blk.{i}.attn_v.weight", "model.decoder.layers.{i}.self_attn.v_proj.weight", "DD"),
        Row(
            "blk.{i}.attn_output.weight", "model.decoder.layers.{i}.self_attn.out_proj.weight", "DD"
        ),
        Row("blk.{i}.ffn_norm.weight", "model.decoder.layers.{i}.final_layer_norm.weight", "D"),
        Row("blk.{i}.ffn_up.weight", "model.decoder.layers.{i}.fc1.weight", "FD"),
        Row(
            "blk.{i}.ffn_down_t.weight",
            "model.decoder.layers.{i}.fc2.weight",
            "DF",
            Layout.TRANSPOSED,
        ),
    )
)


def model_rows(arch: str, layers: int, *, tied: bool, norms: int) -> Iterator[Row]:
    """Yield every tensor of the model, without the predictors, in file order.

    Args:
        arch: One of `ARCHITECTURES`.
        tied: Whether the output matrix is the embedding. The engine needs an output matrix, except
            in an OPT, so the embedding is written a second time.
        norms: Norms in a falcon's layer, 1 or 2.
    """
    first, layer = {
        "llama": (_LLAMA, _LLAMA_LAYER),
        "bamboo": (_LLAMA, _LLAMA_LAYER),
        "falcon": (_FALCON, (*_FALCON_NORMS[norms], *_FALCON_LAYER)),
        "opt": (_OPT, _OPT_LAYER),
    }[arch]
    for row in first:
        shared = tied and row.target == "output.weight"
        yield row._replace(source=first[0].source) if shared else row
    for i in range(layers):
        for row in layer:
            yield row._replace(target=row.target.format(i=i), source=row.source.format(i=i))


def predictor_names(layer: int) -> tuple[str, str]:
    """Return the names of fc1 (R, D) and fc2 (F, R) in the file."""
    return f"blk.{layer}.fc1.weight", f"blk.{layer}.fc2.weight"


def arranged(weight: Tensor, layout: Layout, heads: int, kv_heads: int) -> Tensor:
    """Rearrange a source's weight for the file; the result may be a view."""
    if layout is Layout.PLAIN:
        return weight
    if layout is Layout.TRANSPOSED:
        return weight.T
    if layout is Layout.FUSED:
        group = heads // kv_heads
        parts = torch.split(
            weight.view(kv_heads, group + 2, -1, weight.shape[1]), [group, 1, 1], dim=1
        )
        return torch.cat([part.flatten(0, 2) for part in parts])
    groups = heads if layout is Layout.QUERY else kv_heads
    return weight.view(groups, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
