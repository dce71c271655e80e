"""Estimate the disk and memory that a collection takes, before its model is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from sparsecast.collect.config import CollectConfig
from sparsecast.collect.output import finished_shards, partial_folder
from sparsecast.collect.store.shard import Shape
from sparsecast.collect.store.writer import BUFFERS
from sparsecast.core.disk import check_disk_space, describe_space, format_bytes
from sparsecast.core.messages import log
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.first_layers import check_model_memory, keeps_own_copy
from sparsecast.core.models.shape import weight_bytes
from sparsecast.core.text.tokens import COUNTED

INSTEAD = ", fewer --tokens, fewer --layers or int8 inputs"
ACTIVE = 0.15
"""Assumed share of active neurons, for the size of energies; all other sizes are exact."""


@dataclass(frozen=True)
class Needs:
    """Bytes that a collection takes."""

    store: int
    """On the disk."""
    model: int
    buffers: int
    """Host memory of the shard buffers."""


def estimate(
    outline: PreTrainedModel,
    dtype: torch.dtype,
    shape: Shape,
    tokens: Mapping[str, int],
    largest_shard: int,
) -> Needs:
    """Estimate what recording takes.

    Args:
        outline: The model on the meta device, see `empty_model`.
        tokens: Tokens per split.
        largest_shard: Tokens of the largest shard.
    """
    return Needs(
        store=store_bytes(shape, tokens, largest_shard),
        model=weight_bytes(outline, dtype),
        buffers=BUFFERS * shape.nbytes(largest_shard),
    )


def store_bytes(shape: Shape, tokens: Mapping[str, int], largest_shard: int = 0) -> int:
    """Size of a store with these tokens per split: shards and statistics.

    Args:
        largest_shard: Tokens of a shard, where a batch has more than `shape.shard_tokens`.
    """
    per_shard = max(shape.shard_tokens, largest_shard)
    layers, width = len(shape.layers), shape.ffn_width
    ffns = layers * max(1, shape.experts)
    total = 0
    for split, count in tokens.items():
        fired = math.ceil(count / per_shard) * 4 * ffns * width
        numbers = layers * (8 * shape.experts_per_token if shape.experts else 4)
        each = (8 + numbers) if split == COUNTED else shape.token_bytes
        if shape.energy and split != COUNTED:
            each += round(ACTIVE * layers * width)
        total += fired + count * each + 8 * ffns * (2 * width + 1)
    return total


def check_needs(
    cfg: CollectConfig,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    needs: Needs,
) -> None:
    """Log what a collection takes.

    Raises:
        InputError: See `check_fits`.
    """
    log.info(
        f"{cfg.out}: takes about {describe_space(cfg.out, needs.store)}; of memory "
        f"{format_bytes(needs.model)} for the model and {format_bytes(needs.buffers)} for shards"
    )
    check_fits(cfg, checkpoint, device, dtype, needs)


def check_fits(
    cfg: CollectConfig,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    needs: Needs,
) -> None:
    """Raise `InputError` if the disk cannot hold what is not there yet, or the memory not the model
    alone."""
    check_disk_space(cfg.out, missing_bytes(cfg.out, needs), "the store", INSTEAD)
    if cfg.device_map is None:  # which may leave weights on the disk
        own = keeps_own_copy(checkpoint, dtype)
        check_model_memory(cfg.out, device, dtype, needs.model, own=own)


def missing_bytes(out: Path, needs: Needs) -> int:
    """Return the bytes of the store that an interrupted run has not written yet."""
    return needs.store - sum(p.stat().st_size for p in finished_shards(partial_folder(out)))
