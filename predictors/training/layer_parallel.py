"""Distribute layers over the processes of one torchrun, and gather them again.

Predictors of different layers are independent, so each process trains every n-th layer and only
the results are exchanged: each process writes its layers' weights to the unfinished run's folder,
and the leading one reads them all. With `--data-parallel` every process trains all layers on its
share of the batches, and gradients are averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch

from sparsecast.core.distributed import DistributedContext
from sparsecast.core.errors import InputError
from sparsecast.core.torch_files import save_torch
from sparsecast.predictors.calibration.bias import BiasUnits, SpreadBias, UncalibratedPredictor
from sparsecast.predictors.predictor import Predictor
from sparsecast.predictors.training.plan import TrainingPlan

KINDS: dict[str, Any] = {kind.__name__: kind for kind in (BiasUnits, SpreadBias, Predictor)}

Trained = TypeVar("Trained", UncalibratedPredictor, Predictor, UncalibratedPredictor | Predictor)


def layers_of_process(
    layers: Sequence[int], context: DistributedContext, data_parallel: bool
) -> list[int]:
    """The layers that this process trains.

    Raises:
        InputError: More processes than layers.
    """
    if data_parallel or context.size == 1:
        return list(layers)
    if context.size > len(layers):
        raise InputError(
            f"train: {context.size} processes share {len(layers)} layers, so some would have none; "
            "start fewer processes, or distribute batches with --data-parallel true"
        )
    return list(layers[context.rank :: context.size])


def gather_layers(plan: TrainingPlan, own: dict[int, Trained]) -> list[Trained] | None:
    """The trained layers of all processes, in order, on the leading one; None on the others.

    Args:
        own: The layers that this process trained.

    Raises:
        InputError: A layer is missing, because the processes do not share the folder.
    """
    context, work, layers = plan.context, plan.work, range(len(plan.ranks))
    if plan.data_parallel or context.size == 1:
        return [own[layer] for layer in layers] if context.leads else None
    for layer, trained in own.items():
        save_torch(state_of(trained), _file(work, layer))
    context.wait()
    if not context.leads:
        return None
    if absent := [layer for layer in layers if not _file(work, layer).is_file()]:
        raise InputError(
            f"{work}: lacks layers {absent}, which other processes trained; put --out on a disk "
            "that all machines share"
        )
    states = [torch.load(_file(work, layer), weights_only=True) for layer in layers]
    return [from_state(state) for state in states]


def state_of(trained: UncalibratedPredictor | Predictor) -> dict[str, Any]:
    """Return what a file holds of a trained predictor."""
    state = {field.name: getattr(trained, field.name) for field in fields(trained)}
    return {"kind": type(trained).__name__, **state}


def from_state(state: dict[str, Any]) -> Any:
    """Return the trained predictor of a state."""
    return KINDS[state["kind"]](**{name: value for name, value in state.items() if name != "kind"})


def _file(work: Path, layer: int) -> Path:
    return work / f"layer-{layer}.pt"
