"""Which tensor of a llama checkpoint becomes which tensor of PowerInfer's file, and how.

Names are those of PowerInfer's llama.cpp (`LLM_TENSOR_NAMES`, arch llama). The down projection is
stored transposed, one row per neuron. transformers rotates (first half, second half) of a head,
the engine rotates neighbours, so the rows of q and k are interleaved head by head.

Shape letters: V vocabulary, D hidden, K key/value width, F FFN width, R predictor rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import NamedTuple

from torch import Tensor

EMBEDDING = "model.embed_tokens.weight"


class Layout(Enum):
    """How the source's rows and columns lie in the file."""

    PLAIN = "plain"
    TRANSPOSED = "transposed"
    QUERY = "interleaved per query head"
    KEY = "interleaved per key/value head"


class Row(NamedTuple):
    """One tensor; `{i}` in the names stands for the layer."""

    target: str
    source: str
    shape: str
    """Of the source, in shape letters."""
    layout: Layout = Layout.PLAIN


_GLOBAL = (
    Row("token_embd.weight", EMBEDDING, "VD"),
    Row("output_norm.weight", "model.norm.weight", "D"),
    Row("output.weight", "lm_head.weight", "VD"),
)
_LAYER = (
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


def llama_rows(layers: int, tied: bool) -> Iterator[Row]:
    """Every tensor of the model but the predictors, in file order.

    Args:
        tied: The model has no output matrix of its own; the engine wants one, so the embedding
            is written a second time.
    """
    for row in _GLOBAL:
        yield row._replace(source=EMBEDDING) if tied and row.target == "output.weight" else row
    for i in range(layers):
        for row in _LAYER:
            yield row._replace(target=row.target.format(i=i), source=row.source.format(i=i))


def predictor_names(layer: int) -> tuple[str, str]:
    """File names of fc1 (R, D) and fc2 (F, R)."""
    return f"blk.{layer}.fc1.weight", f"blk.{layer}.fc2.weight"


def arranged(weight: Tensor, layout: Layout, heads: int, kv_heads: int) -> Tensor:
    """The source's weight with rows and columns as the file wants them; may be a view."""
    if layout is Layout.PLAIN:
        return weight
    if layout is Layout.TRANSPOSED:
        return weight.T
    groups = heads if layout is Layout.QUERY else kv_heads
    return weight.view(groups, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
