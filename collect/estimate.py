"""What a collection will take, before its model is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from transformers import PreTrainedModel

from sparsecast.collect.config import CollectConfig
from sparsecast.collect.resume import shards, unfinished
from sparsecast.collect.store.shard import Shape
from sparsecast.collect.store.writer import BUFFERS
from sparsecast.core.disk import check_room, free, size
from sparsecast.core.errors import InputError
from sparsecast.core.messages import log
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.families import activation_rule
from sparsecast.core.models.loading import ffn_shape, pick_device, pick_dtype
from sparsecast.core.models.pretrained import empty_model
from sparsecast.core.text.corpus_files import most_tokens
from sparsecast.core.text.tokens import COUNTED

ACTIVE = 0.15
"""The share of neurons taken to fire, for the bytes of energies. All else is known."""


def weight_bytes(model: PreTrainedModel, dtype: torch.dtype) -> int:
    return sum(weight.numel() for weight in model.parameters()) * dtype.itemsize


def store_bytes(shape: Shape, tokens: Mapping[str, int], full: int) -> int:
    """Of a store with so many tokens per split: shards and statistics.

    Args:
        full: Tokens after which a shard is full.
    """
    layers, width = len(shape.layers), shape.ffn_width
    total = 0
    for split, count in tokens.items():
        fired = math.ceil(count / full) * 4 * layers * width
        each = (8 + 4 * layers) if split == COUNTED else shape.token_bytes
        if shape.energy and split != COUNTED:
            each += round(ACTIVE * layers * width)
        total += fired + count * each + 8 * layers * (2 * width + 1)
    return total


def look(
    cfg: CollectConfig,
    checkpoint: Checkpoint,
    wanted: Mapping[str, int],
    limit: Callable[[CollectConfig, Shape], tuple[int, int]],
) -> int:
    """Bytes of the store; refuses what can be seen without the weights, tells what a run takes.

    Args:
        wanted: Tokens per split; no more are counted than the corpus can have.
        limit: Tokens of a full shard and of the largest.
    """
    activation_rule(checkpoint.config, cfg.model, cfg.activation_threshold)
    dtype = pick_dtype(cfg.dtype, checkpoint.config.dtype, pick_device(cfg.device))
    checkpoint.check()
    model = empty_model(checkpoint.config)
    n_layers, hidden_size, ffn_width = ffn_shape(model)
    shape = Shape(
        layers=layers_of(cfg, n_layers),
        hidden_size=hidden_size,
        ffn_width=ffn_width,
        x_dtype=x_dtype_of(cfg, dtype),
        energy=cfg.energy,
    )
    full, largest = limit(cfg, shape)
    most = most_tokens(cfg.corpus)
    there = {split: count if most is None else min(count, most) for split, count in wanted.items()}
    need = store_bytes(shape, there, full)
    kept = sum(path.stat().st_size for path in shards(unfinished(cfg.out)))
    weights, host = weight_bytes(model, dtype), BUFFERS * shape.nbytes(largest)
    log.info(
        f"{cfg.out}: takes about {size(need)} of disk, {size(free(cfg.out))} are free there; of "
        f"memory {size(weights)} for the model and {size(host)} for shards"
    )
    check_room(cfg.out, need - kept, "the store", ", fewer --tokens, fewer --layers or int8 inputs")
    return need


def layers_of(cfg: CollectConfig, n_layers: int) -> list[int]:
    """The layers to record of a model's `n_layers`."""
    layers = list(range(n_layers)) if cfg.layers is None else cfg.layers
    if out := [i for i in layers if not 0 <= i < n_layers]:
        raise InputError(f"--layers: the model has layers 0 to {n_layers - 1}, got {out}")
    if not layers:
        raise InputError(f"--layers: got none, expected some of 0 to {n_layers - 1}")
    return layers


def x_dtype_of(cfg: CollectConfig, dtype: torch.dtype) -> str:
    """How inputs are stored of a model that computes in `dtype`."""
    if cfg.input_dtype != "auto":
        return cfg.input_dtype
    return "bfloat16" if dtype == torch.bfloat16 else "float16"
