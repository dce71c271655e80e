"""The scales of Granite and MiniCPM, and how they become part of a LLaMA's weights.

A Granite multiplies at run time, and so does a MiniCPM, which is read as one (remote_configs.py):

    h = embed_tokens(ids) * embedding_multiplier                         scale_emb
    h = h + o_proj(...) * residual_multiplier, h + down_proj(...) * ...  scale_depth / sqrt(layers)
    logits = lm_head(norm(h)) / logits_scaling                           hidden / dim_model_base
    scores = q . k * attention_multiplier                                head_dim^-0.5

A LLaMA has head_dim^-0.5 and no other scale. All four are linear in one matrix, so a LLaMA computes
the same from

    embed_tokens * embedding_multiplier        lm_head / logits_scaling
    o_proj, down_proj * residual_multiplier    q_proj * attention_multiplier * sqrt(head_dim)

Embedding and head are two tensors then, also where the model ties them. The residual stream, the
inputs of norms and of matrices, and x1 have the same values in both forms, so predictors fit both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

HEAD = "lm_head"


@dataclass(frozen=True)
class Scales:
    """What the matrices of a LLaMA have more than those of the model."""

    embedding: float
    """Factor of embed_tokens."""
    residual: float
    """Factor of o_proj and down_proj."""
    logits: float
    """Divisor of lm_head."""
    attention: float
    """Factor of q_proj; exactly 1 for a model that divides scores by the root of its head size."""

    def factor(self, name: str) -> float:
        """Return the factor of a LLaMA's tensor, by its name; 1 for most.

        A bias has the factor of its matrix.
        """
        module = name.rpartition(".")[0].rpartition(".")[2]
        return {
            "embed_tokens": self.embedding,
            HEAD: 1 / self.logits,
            "o_proj": self.residual,
            "down_proj": self.residual,
            "q_proj": self.attention,
        }.get(module, 1.0)


def scales_of(config: PreTrainedConfig) -> Scales | None:
    """Return the scales of a Granite's config, which a MiniCPM's becomes; None for other models."""
    if config.model_type != "granite":
        return None
    known: Any = config
    head_dim = getattr(config, "head_dim", None) or known.hidden_size // known.num_attention_heads
    attention = known.attention_multiplier * math.sqrt(head_dim)
    return Scales(
        float(known.embedding_multiplier),
        float(known.residual_multiplier),
        float(known.logits_scaling),
        1.0 if math.isclose(attention, 1.0, rel_tol=1e-9) else attention,
    )


def folded(weight: Tensor, factor: float) -> Tensor:
    """Return `weight * factor`, rounded once to float32; the weight itself where the factor is 1.

    Args:
        weight: Any shape, float; float64 stays float64.
    """
    if factor == 1.0:
        return weight
    return (weight.double() * factor).to(torch.promote_types(weight.dtype, torch.float32))


def unscale(model: PreTrainedModel) -> None:
    """Set a Granite's scales to those of a LLaMA, in place, for weights that are folded.

    Embedding and head become two parameters, each with the values that they shared.
    """
    config: Any = model.config
    inner: Any = model.model
    inner.embedding_multiplier = config.embedding_multiplier = 1.0
    config.logits_scaling = config.residual_multiplier = 1.0
    for layer in inner.layers:
        layer.residual_multiplier = 1.0
        layer.self_attn.scaling = config.attention_multiplier = layer.self_attn.head_dim**-0.5
    untie(model)


def untie(model: PreTrainedModel) -> None:
    """Give the head a parameter of its own where it shares the embedding's, in place."""
    known: Any = model
    head, embedding = known.get_output_embeddings(), known.get_input_embeddings()
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    known.config.tie_word_embeddings = False
