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

from sparsecast.collect.errors import InputError
from sparsecast.collect.ranks import Team
from sparsecast.predictors.bias import BiasUnits, Spread, Uncut
from sparsecast.predictors.mlp import Predictor

KINDS: dict[str, Any] = {kind.__name__: kind for kind in (BiasUnits, Spread, Predictor)}

Trained = TypeVar("Trained", Uncut, Predictor)


def share_of(layers: Sequence[int], team: Team, data_parallel: bool) -> list[int]:
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
    mine: dict[int, Trained], work: Path, team: Team, data_parallel: bool
) -> list[Trained] | None:
    """The trained layers of all processes, in order; None but on the leading one."""
    if data_parallel or team.size == 1:
        return [mine[layer] for layer in sorted(mine)] if team.leads else None
    for layer, trained in mine.items():
        state = {field.name: getattr(trained, field.name) for field in fields(trained)}
        torch.save({"kind": type(trained).__name__, **state}, work / f"layer-{layer}.pt")
    team.wait()
    if not team.leads:
        return None
    saved = sorted(work.glob("layer-*.pt"), key=lambda path: int(path.stem.split("-")[1]))
    states = [torch.load(path, weights_only=True) for path in saved]
    return [KINDS[state.pop("kind")](**state) for state in states]
