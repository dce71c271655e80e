"""Resume on another number of processes: give each the training state of its layers.

Layers train independently of each other, and every tensor of a checkpoint is stacked along them
(lightning_module.py, predictors/baselines/public_recipe.py). So checkpoints of layers that have
finished as many epochs can be cut and joined, and training goes on with the numbers that it would
have had. A file's name says which layers it holds: `last.ckpt` all of them, `last-5.ckpt` layers 0
and 2, the bits of the hexadecimal number. Of several files with one layer the one of more epochs
counts.

Processes do not wait for each other after an epoch, so a kill may find them at different ones.
Layers that are behind then catch up first; from there all train together.

Memory: what a joined checkpoint holds, 16 bytes a weight; before training takes more.
Disk: while checkpoints are joined, each layer is in two.

Shape letters: L layers, R hidden units, padded to the most that a layer of the checkpoint has.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsecast.core.messages import log
from sparsecast.core.torch_files import load_state, save_torch
from sparsecast.predictors.training.layer_parallel import layers_of_process
from sparsecast.predictors.training.plan import TrainingPlan

PARTS = ("state_dict", "optimizer_states", "epoch", "global_step", "loops")
"""What a checkpoint must hold."""


class Kept(NamedTuple):
    """A checkpoint of an unfinished run."""

    path: Path
    layers: list[int]
    epochs: int
    """Finished ones."""


def regroup(plan: TrainingPlan) -> list[tuple[int, TrainingPlan]]:
    """Join the checkpoints of this process's layers that have finished as many epochs.

    Files that hold no layer of another process are removed once their layers stand elsewhere.

    Returns:
        (finished epochs, plan of their layers), fewest first; one if all stand alike.

    Raises:
        InputError: A damaged checkpoint.
    """
    own = set(plan.own_layers)
    kept = [
        Kept(path, layers, load_state(path, *PARTS)["epoch"] + 1)
        for path, layers in _files(plan)
        if own & set(layers)  # other processes may be replacing theirs
    ]
    newest: dict[int, Kept] = {}
    for one in sorted(kept, key=lambda one: one.epochs):
        newest |= dict.fromkeys(one.layers, one)
    stand = {layer: newest[layer].epochs if layer in newest else 0 for layer in plan.own_layers}
    groups = []
    for epochs in sorted(set(stand.values())):
        layers = [layer for layer in plan.own_layers if stand[layer] == epochs]
        part = replace(plan, own_layers=layers)
        if epochs and not any(one.path == part.checkpoint and one.epochs == epochs for one in kept):
            save_torch(_joined(part, newest), part.checkpoint)
        groups.append((epochs, part))
    used = {part.checkpoint for _, part in groups}
    for one in kept:
        if one.path not in used and set(one.layers) <= own:
            one.path.unlink()
    return groups


def left_behind(plan: TrainingPlan) -> tuple[TrainingPlan, int] | None:
    """The layers that have finished fewest epochs, and as many as those before them; None if all
    stand alike."""
    if plan.shape.experts:
        return None
    groups = regroup(plan)
    if len(groups) == 1:
        return None
    (epochs, part), (next_epochs, _), *_ = groups
    log.info(f"layers {part.own_layers} have finished {epochs} epochs, others {next_epochs}")
    return part, next_epochs


def remove_divided(plan: TrainingPlan) -> None:
    """Remove the files whose layers are now those of several processes, once each has its own."""
    layers, context = range(len(plan.ranks)), plan.context
    shares = [
        set(layers_of_process(layers, replace(context, rank=rank), plan.data_parallel))
        for rank in range(context.size)
    ]
    for path, of_file in _files(plan):
        if not any(set(of_file) <= share for share in shares):
            path.unlink()


def _files(plan: TrainingPlan) -> Iterator[tuple[Path, list[int]]]:
    """Checkpoints, and the layers that each holds."""
    layers = range(len(plan.ranks))
    for path in list(plan.work.glob("last*.ckpt")):
        if path.name == "last.ckpt":
            yield path, list(layers)
        elif (bits := re.fullmatch(r"last-([0-9a-f]+)\.ckpt", path.name)) is not None:
            yield path, [layer for layer in layers if int(bits[1], 16) >> layer & 1]


def _joined(part: TrainingPlan, newest: dict[int, Kept]) -> dict[str, Any]:
    """Return the checkpoint of `part.own_layers`, from those that hold them."""
    states = {path: load_state(path) for path in {newest[n].path for n in part.own_layers}}
    where = [(states[newest[n].path], newest[n].layers.index(n)) for n in part.own_layers]
    units = max(part.own_units)
    first, _ = where[0]
    weights = {
        name: _stacked([state["state_dict"][name][place] for state, place in where], name, units)
        for name in first["state_dict"]
    }
    moments: dict[int, dict[str, Tensor]] = {}
    (optimizer,) = first["optimizer_states"]
    # The parameters come first in a state dict, in the order of the optimizer's.
    for (number, of_parameter), name in zip(optimizer["state"].items(), weights, strict=False):
        moments[number] = {"step": of_parameter["step"].clone()}
        for what in of_parameter.keys() - {"step"}:
            rows = [
                state["optimizer_states"][0]["state"][number][what][place] for state, place in where
            ]
            moments[number][what] = _stacked(rows, name, units)
    optimizers = [{**optimizer, "state": moments}]
    return {**first, "state_dict": weights, "optimizer_states": optimizers}


def _stacked(rows: Sequence[Tensor], name: str, units: int) -> Tensor:
    """Stack the parts of layers, each with so many hidden units.

    Args:
        name: Ends with the letters of the stacked tensor's shape.
    """
    axis = name.rpartition("_")[2].removeprefix("L").find("R")
    if axis < 0:
        return torch.stack(list(rows))
    shape = list(rows[0].shape)
    shape[axis] = units
    stacked = rows[0].new_zeros(len(rows), *shape)
    for place, row in enumerate(rows):
        kept = min(units, row.shape[axis])
        stacked[place].narrow(axis, 0, kept).copy_(row.narrow(axis, 0, kept))
    return stacked
