"""How near a predictor's decisions come to the threshold, where the engine's may turn over.

Shape letters: N sequences, S sequence, T tokens, F FFN width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsecast.export.engine.emulator import Emulator
from sparsecast.export.read.reader import GGUFFile


class Decision(NamedTuple):
    """One neuron of one token."""

    distance: float
    """Of the predictor's logit from the threshold."""
    layer: int
    neuron: int

    def __str__(self) -> str:
        return f"layer {self.layer} neuron {self.neuron} {self.distance:.1e} from the threshold"


NONE = Decision(float("inf"), 0, 0)


def closest_decisions(file: GGUFFile, ids_NS: Tensor) -> list[Decision]:
    """For every position, sequence by sequence, the decision nearest to the threshold of those that
    it depends on: its own and those of all tokens before it."""
    watching = _Watching(file)
    watching.logits(ids_NS)
    found, best = [], NONE
    for at in range(ids_NS.numel()):
        if at % ids_NS.shape[1] == 0:
            best = NONE
        here = (
            Decision(float(distance_T[at]), layer, int(neuron_T[at]))
            for layer, (distance_T, neuron_T) in enumerate(watching.closest)
        )
        best = min(best, *here)
        found.append(best)
    return found


class _Watching(Emulator):
    def __init__(self, file: GGUFFile) -> None:
        super().__init__(file)
        self.closest: list[tuple[Tensor, Tensor]] = []
        """Per layer: distance (T,) and neuron (T,)."""

    def predictor_logits(self, x_TD: Tensor, layer: int) -> Tensor:
        logits_TF = super().predictor_logits(x_TD, layer)
        least = torch.min((logits_TF - self.header.threshold).abs(), dim=-1)
        self.closest.append((least.values, least.indices))
        return logits_TF
