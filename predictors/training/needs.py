"""What training takes of disk and memory, before it begins.

    checkpoint   float32 weights, those of the best epoch, and two AdamW moments: 16 bytes a weight
    disk         two checkpoints while one replaces the other; at the end one, and the predictors
    memory       20 bytes a weight, with gradients; rounding to a quantized format another 8

Shape letters: D hidden, F FFN width, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sparsecast.core.disk import check_disk_space, describe_space, format_bytes
from sparsecast.core.messages import log
from sparsecast.predictors.calibration.bias import bias_units
from sparsecast.predictors.config import TrainConfig

KEPT = 16
"""Bytes a weight in a checkpoint."""
HELD = 20
"""Bytes a weight in memory."""
ROUNDING = 8
"""Bytes a weight in memory on top, while a quantized format is rounded to."""


def trained_weights(dtype: str, ranks: Sequence[int], hidden_size: int, ffn_width: int) -> int:
    """Weights of layers that are trained together; each takes as many as the largest."""
    units = max(ranks) - (0 if dtype == "f16" else bias_units(dtype))
    offsets = 0 if dtype == "f16" else ffn_width
    return len(ranks) * (units * (hidden_size + ffn_width) + offsets)


def predictor_bytes(dtype: str, ranks: Sequence[int], hidden_size: int, ffn_width: int) -> int:
    """Size of the files: f16, or float32 that holds the values of a quantized format."""
    return sum(ranks) * (hidden_size + ffn_width) * (2 if dtype == "f16" else 4)


def disk_bytes(
    cfg: TrainConfig, dtype: str, ranks: Sequence[int], shape: tuple[int, int], *, split: bool
) -> int:
    """The most that a run has on its disk at any moment.

    Args:
        shape: (D, F).
        split: Whether processes hand each other their layers in files.
    """
    done = predictor_bytes(dtype, ranks, *shape)
    if cfg.recipe == "svd":
        return done
    weights = trained_weights(dtype, ranks, *shape)
    last = KEPT * weights
    return max((2 if cfg.steps > 1 else 1) * last, last + (4 * weights if split else 0) + done)


def tell_needs(
    cfg: TrainConfig,
    need: int,
    held: int,
    dtype: str,
    ranks: Sequence[int],
    shape: tuple[int, int],
) -> None:
    """Say what a run takes, and refuse what the disk cannot hold.

    Args:
        need: See `disk_bytes`.
        held: Bytes of it that an interrupted run has written.
        ranks: Of the layers that this process trains.
    """
    each = HELD + (0 if dtype == "f16" else ROUNDING)
    memory = each * trained_weights(dtype, ranks, *shape)
    matrices = 4 * shape[0] * sum(shape)
    batches = 4 * cfg.tokens_per_step * len(ranks) * (2 * shape[0] + shape[1] // 8)
    log.info(
        f"{cfg.out}: takes up to {describe_space(cfg.out, need)}; and "
        f"{format_bytes(memory + matrices + batches)} of memory"
    )
    check_disk_space(
        cfg.out, need - held, "training", ", a smaller --rank or --predictor-dtype f16"
    )


def held_bytes(work: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in work.glob(pattern))
