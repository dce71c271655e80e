"""What a collection is, resolved before its model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from sparsecast.collect.config import CollectConfig
from sparsecast.collect.estimate import Needs, estimate
from sparsecast.collect.store.shard import Shape
from sparsecast.core.errors import InputError
from sparsecast.core.models.activations import ActivationRule
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.families import activation_rule
from sparsecast.core.models.loading import check_seq_len, pick_device, pick_dtype
from sparsecast.core.models.pretrained import empty_model
from sparsecast.core.models.shape import model_shape
from sparsecast.core.text.corpus_files import max_tokens
from sparsecast.core.text.tokens import split_quotas


@dataclass(frozen=True, kw_only=True)
class Outline:
    """The options of a collection that follow from its config and the model's."""

    model: PreTrainedModel
    """On the meta device."""
    rule: ActivationRule
    device: torch.device
    dtype: torch.dtype
    shape: Shape
    quotas: Mapping[str, int]
    """Tokens to record per split."""
    tokens: Mapping[str, int]
    """The same, at most those that the corpus can have."""
    largest_shard: int
    """Tokens of the largest shard that may occur."""
    needs: Needs


def make_outline(
    cfg: CollectConfig, checkpoint: Checkpoint, shares: Mapping[str, int] | None = None
) -> Outline:
    """Resolve what needs no weights.

    Raises:
        InputError: An activation without zeros, a device or layers that are not there, or longer
            sequences than the model's.
    """
    rule = activation_rule(checkpoint.config, cfg.model, cfg.activation_threshold)
    device = pick_device(cfg.device)
    dtype = pick_dtype(cfg.dtype, checkpoint.config.dtype, device)
    model = empty_model(checkpoint.config)
    check_seq_len(cfg.seq_len, model, cfg.model)
    shape = _shape(cfg, model, dtype)
    batch_tokens = min(cfg.batch_size * cfg.seq_len, max(cfg.tokens, cfg.count_tokens))
    largest_shard = max(shape.shard_tokens, batch_tokens)
    quotas = shares or split_quotas(cfg.tokens, cfg.count_tokens)
    most = max_tokens(cfg.corpus, cfg.seq_len)
    tokens = {name: count if most is None else min(count, most) for name, count in quotas.items()}
    return Outline(
        model=model,
        rule=rule,
        device=device,
        dtype=dtype,
        shape=shape,
        quotas=quotas,
        tokens=tokens,
        largest_shard=largest_shard,
        needs=estimate(model, dtype, shape, tokens, largest_shard),
    )


def _shape(cfg: CollectConfig, model: PreTrainedModel, dtype: torch.dtype) -> Shape:
    """Return the store's shape for a model that computes in `dtype`."""
    sizes = model_shape(model)
    layers = list(range(sizes.layers)) if cfg.layers is None else cfg.layers
    if out_of_range := [i for i in layers if not 0 <= i < sizes.layers]:
        raise InputError(
            f"--layers: the model has layers 0 to {sizes.layers - 1}, got {out_of_range}"
        )
    if not layers:
        raise InputError(f"--layers: got none, expected some of 0 to {sizes.layers - 1}")
    if cfg.energy and sizes.experts:
        raise InputError(
            f"--energy: {cfg.model} is a mixture of experts, whose energies are not recorded; "
            "leave it out"
        )
    x_dtype: str = cfg.input_dtype
    if x_dtype == "auto":
        x_dtype = "bfloat16" if dtype == torch.bfloat16 else "float16"
    return Shape(
        layers=layers,
        hidden_size=sizes.hidden_size,
        ffn_width=sizes.ffn_width,
        x_dtype=x_dtype,
        energy=cfg.energy,
        experts=sizes.experts,
        experts_per_token=sizes.experts_per_token,
    )
