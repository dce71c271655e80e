"""Disk and memory that a training run takes.

checkpoint   weights, best weights and two AdamW moments, all float32: 16 bytes a weight
disk         two checkpoints while one replaces the other; at the end one, and the predictors
memory       20 bytes a weight, gradients included; rounding to a quantized format takes 8 more

In a mixture of experts the weights of checkpoints and memory are those of one layer's experts; what
is trained of the other layers waits on the disk, 4 bytes a weight.
"""

from __future__ import annotations

from collections.abc import Sequence

from sparsecast.core.disk import check_disk_space, describe_space, format_bytes
from sparsecast.core.memory import check_memory
from sparsecast.core.messages import log
from sparsecast.predictors.training.plan import TrainingPlan
from sparsecast.predictors.training.trainer import LAST

CHECKPOINT_BYTES = 16
"""Per weight."""
MEMORY_BYTES = 20
"""Per weight."""
ROUNDING_BYTES = 8
"""Extra memory per weight of a quantized format."""


def disk_bytes(plan: TrainingPlan) -> int:
    """The most bytes that all processes of a run have on the disk at any moment."""
    predictors = _predictor_bytes(plan)
    if plan.recipe == "svd":
        return predictors
    layers = range(len(plan.ranks))
    if plan.shape.experts:
        trained = sum(_trained_weights(plan, part.own_layers) for part in plan.groups())
        return 2 * CHECKPOINT_BYTES * _largest_group(plan) + 4 * trained + predictors
    weights = _trained_weights(plan, layers)
    checkpoint = CHECKPOINT_BYTES * weights
    handed_over = 4 * weights if len(plan.own_layers) < len(layers) else 0
    checkpoints = 2 if plan.schedule.num_epochs > 1 else 1
    return max(checkpoints * checkpoint, checkpoint + handed_over + predictors)


def check_needs(plan: TrainingPlan) -> None:
    """Report the disk and memory that a run takes.

    Raises:
        InputError: See `check_fits`.
    """
    log.info(
        f"{plan.out}: takes up to {describe_space(plan.out, disk_bytes(plan))}; and "
        f"{format_bytes(_memory_bytes(plan))} of memory"
    )
    check_fits(plan)


def check_fits(plan: TrainingPlan) -> None:
    """Raise `InputError` if the disk has too little room, what an interrupted run has written
    included, or the memory for weights, gradients, moments and the best epoch alone."""
    instead = ", a smaller --rank or --predictor-dtype f16"
    check_disk_space(plan.out, missing_bytes(plan), "training", instead)
    on_cpu, state = plan.device.type == "cpu", state_bytes(plan)
    check_memory(
        f"{plan.out}: training",
        plan.device,
        host=state if on_cpu else 0,
        on_device=0 if on_cpu else state,
        instead="choose a smaller --rank, or share the layers among processes with torchrun",
    )


def missing_bytes(plan: TrainingPlan) -> int:
    """Bytes of disk that a run takes and an interrupted one has not written yet."""
    return disk_bytes(plan) - sum(path.stat().st_size for path in plan.work.glob(LAST))


def state_bytes(plan: TrainingPlan) -> int:
    """Memory of the weights that this process trains side by side, gradients, moments and best
    epoch included; none for a recipe that trains nothing."""
    return 0 if plan.recipe == "svd" else MEMORY_BYTES * trained_together(plan)


def trained_together(plan: TrainingPlan) -> int:
    """Weights that this process trains side by side."""
    return _trained_weights(plan, _together(plan))


def _together(plan: TrainingPlan) -> list[int]:
    if not plan.shape.experts:
        return plan.own_layers
    return max((part.own_layers for part in plan.groups()), key=len, default=[])


def _memory_bytes(plan: TrainingPlan) -> int:
    """Memory of this process: weights, the matrices of the warm start and four batches."""
    d, f = plan.shape.hidden_size, plan.shape.ffn_width
    per_weight = MEMORY_BYTES + (0 if plan.dtype == "f16" else ROUNDING_BYTES)
    together = _together(plan)
    weights = per_weight * _trained_weights(plan, together)
    matrices = 4 * d * (d + f)
    row_bytes = 2 * d + f // 8 + f * (plan.loss == "value")
    batches = 4 * plan.schedule.batch_tokens * len(together) * row_bytes
    return weights + matrices + batches


def _trained_weights(plan: TrainingPlan, layers: Sequence[int]) -> int:
    """Weights of layers that are trained together, each padded to the largest rank among them."""
    d, f = plan.shape.hidden_size, plan.shape.ffn_width
    units = max((plan.free_units[layer] for layer in layers), default=0)
    offsets = 0 if plan.dtype == "f16" else f
    return len(layers) * (units * (d + f) + offsets)


def _largest_group(plan: TrainingPlan) -> int:
    """Weights of the layer with the most experts to train."""
    groups = (_trained_weights(plan, part.own_layers) for part in plan.groups())
    return max(groups, default=0)


def _predictor_bytes(plan: TrainingPlan) -> int:
    """Size of the model_<i>.pt: f16, or float32 that holds the values of a quantized format."""
    per_weight = 2 if plan.dtype == "f16" else 4
    return sum(plan.ranks) * (plan.shape.hidden_size + plan.shape.ffn_width) * per_weight
