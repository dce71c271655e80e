"""Layers shared out over the processes of one torchrun.

Predictors are independent of each other, so a process trains every n-th layer and nothing passes
between them but the result: each leaves its layers' weights beside the unfinished predictors, and
the leading one reads them all. With `--data-parallel` every process has all layers, trains them on
its share of the batches, and gradients are averaged.
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
from sparsecast.predictors.calibration.bias import BiasUnits, Spread, UncalibratedPredictor
from sparsecast.predictors.predictor import Predictor

KINDS: dict[str, Any] = {kind.__name__: kind for kind in (BiasUnits, Spread, Predictor)}

Trained = TypeVar("Trained", UncalibratedPredictor, Predictor)


def share_of(layers: Sequence[int], team: DistributedContext, data_parallel: bool) -> list[int]:
    """The layers that this process trains.

    Raises:
        InputError: More processes than layers.
    """
    if data_parallel or team.size == 1:
        return list(layers)
    if team.size > len(layers):
        raise InputError(
            f"train: {team.size} processes share {len(layers)} layers, so some would have none; "
            "start fewer, or split batches over them with --data-parallel true"
        )
    return list(layers[team.rank :: team.size])


def gathered(
    mine: dict[int, Trained],
    layers: Sequence[int],
    work: Path,
    team: DistributedContext,
    data_parallel: bool,
) -> list[Trained] | None:
    """The trained `layers` of all processes, in order; None but on the leading one.

    Raises:
        InputError: A layer has not come, because the processes do not share the folder.
    """
    if data_parallel or team.size == 1:
        return [mine[layer] for layer in layers] if team.leads else None
    for layer, trained in mine.items():
        state = {field.name: getattr(trained, field.name) for field in fields(trained)}
        save_torch({"kind": type(trained).__name__, **state}, _file(work, layer))
    team.wait()
    if not team.leads:
        return None
    if absent := [layer for layer in layers if not _file(work, layer).is_file()]:
        raise InputError(
            f"{work}: has nothing of layers {absent}, which other processes have trained; they "
            "must all see one --out: put it on a disk that the machines share"
        )
    states = [torch.load(_file(work, layer), weights_only=True) for layer in layers]
    return [KINDS[state.pop("kind")](**state) for state in states]


def _file(work: Path, layer: int) -> Path:
    return work / f"layer-{layer}.pt"
