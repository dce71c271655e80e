"""The plan of one training run: every option resolved, once, before training begins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sparsecast.core.distributed import DistributedContext
from sparsecast.core.files import hidden_sibling
from sparsecast.core.models.shape import ModelShape
from sparsecast.core.run_record import Run
from sparsecast.predictors.calibration.bias import bias_units
from sparsecast.predictors.calibration.objective import Objective
from sparsecast.predictors.training.schedule import Schedule

FREE_TO_CHANGE = ("target_perplexity", "traffic_budget")
"""Options that a resumed run may change: they take effect only after training."""


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """What the recipes, the trainer and the calibration of one run read."""

    out: Path
    """Folder for the predictors; it appears when complete."""
    recipe: str
    """Key of `recipes.RECIPES`."""
    shape: ModelShape
    dtype: str
    """Stored format of the predictors: f16, q8_0 or q4_0."""
    ranks: list[int]
    """Rank of every layer's predictor, bias units included."""
    schedule: Schedule
    steps_per_epoch: int | None
    """Optimizer steps per epoch on a running model; None on recorded activations, which are read
    to their end."""
    objective: Objective
    loss: str
    """count or value, see `TrainConfig.loss`."""
    model: str | None
    """The recorded model, for recipes and objectives that need it."""
    clip_labels: float | None
    own_layers: list[int]
    """Layers that this process trains; in a mixture of experts the numbers of their FFNs, without
    experts that have too few rows."""
    device: torch.device
    context: DistributedContext
    data_parallel: bool
    """Whether processes share batches rather than layers."""
    options: Mapping[str, Any]
    """The options as manifest.json records them under `recipe`."""
    run: Run
    """What run.json says of the training."""
    group: int | None = None
    """The layer whose experts are trained together; None trains `own_layers` at once."""

    @property
    def work(self) -> Path:
        """Folder of the unfinished run."""
        return work_folder(self.out)

    @property
    def checkpoint(self) -> Path:
        """File of the last finished epoch of `own_layers`; those of a dense model give its name."""
        if self.group is not None:
            return self.work / f"last-layer-{self.group}.ckpt"
        if len(self.own_layers) == len(self.ranks):
            return self.work / "last.ckpt"
        return self.work / f"last-{sum(1 << layer for layer in self.own_layers):x}.ckpt"

    @property
    def trained(self) -> Path:
        """File of the trained experts of `group`, once they are."""
        return self.work / f"last-trained-{self.group}.ckpt"

    @property
    def untrained(self) -> list[int]:
        """Experts with too few rows, whose predictors select every neuron."""
        own = set(self.own_layers)
        return [f for f in range(len(self.ranks)) if f not in own] if self.shape.experts else []

    def groups(self) -> Iterator[TrainingPlan]:
        """Plans of a mixture's layers, without those that have nothing to train."""
        for layer in range(self.shape.layers):
            own = [ffn for ffn in self.own_layers if ffn // self.shape.experts == layer]
            if own:
                yield replace(self, own_layers=own, group=layer)

    @property
    def resume_options(self) -> dict[str, Any]:
        return resume_options(self.options, self.batch_share[1])

    @property
    def batch_share(self) -> tuple[int, int]:
        """(i, n): this process trains on the i-th of every n batches."""
        return (self.context.rank, self.context.size) if self.data_parallel else (0, 1)

    @property
    def layers_of_a_process(self) -> int:
        """The most layers of a dense model that a process trains side by side."""
        sharing = 1 if self.data_parallel else self.context.size
        return -(-len(self.ranks) // sharing)

    @property
    def own_units(self) -> list[int]:
        """`free_units` of `own_layers`."""
        return [self.free_units[layer] for layer in self.own_layers]

    @property
    def free_units(self) -> list[int]:
        """Trained hidden units of every layer: its rank without bias units, which f16 lacks."""
        reserved = 0 if self.dtype == "f16" else bias_units(self.dtype)
        return [rank - reserved for rank in self.ranks]


def work_folder(out: Path) -> Path:
    """Folder of an unfinished run."""
    return hidden_sibling(out, "train")


def resume_options(options: Mapping[str, Any], sharing: int) -> dict[str, Any]:
    """Options that a resumed run must share with the interrupted one.

    Args:
        sharing: Processes that share batches; those that share layers may be any number.
    """
    bound = {name: value for name, value in options.items() if name not in FREE_TO_CHANGE}
    return {**bound, "processes": sharing}
