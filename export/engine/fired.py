"""Evaluate a file with the model's own activation, or with random decisions in its place.

Both classes compute every neuron and find those that fire: x1 is not 0 under the model's own rule.
`Measured` continues with exactly these, as the model does, and counts the neurons that the
predictors would have selected. `Drawn` continues with decisions drawn at given rates.

Shape letters: B batch, S sequence, T tokens, F FFN width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparsecast.export.engine.emulator import Emulator
from sparsecast.export.read.reader import GGUFFile


class Rates(NamedTuple):
    """How often a predictor selects a neuron."""

    recall: float
    """Share of the firing neurons that are selected."""
    false: float
    """Share of the silent neurons that are selected."""

    @property
    def informed(self) -> float:
        """Youden's J: 1 for perfect decisions, 0 for decisions that ignore the input."""
        return self.recall - self.false


class _Firing(Emulator):
    def __init__(self, file: GGUFFile, threshold: float) -> None:
        """
        Args:
            threshold: FATReLU's threshold; 0 is ReLU.
        """
        super().__init__(file)
        self._threshold = threshold

    def _fired(self, first: list[Tensor], block: str) -> Tensor:
        """Return which neurons fire, (T, F) bool."""
        gate_TF = self._biased(first, block, None)[0]
        return (self._x1(first, block, None) != 0) & (gate_TF >= self._threshold)


class Measured(_Firing):
    """The model with the file's types; it also counts the predictors' decisions."""

    def __init__(self, file: GGUFFile, threshold: float) -> None:
        super().__init__(file, threshold)
        self._rows: list[list[Tensor]] = [[] for _ in range(self.header.layers)]
        self._skip_TF: Tensor | None = None

    def counts(self, layer: int) -> Tensor:
        """Return (T, 3) float64 counts per token so far: firing and selected, firing, selected."""
        return torch.cat(self._rows[layer]).double()

    def _skipped(self, x_TD: Tensor, block: str) -> Tensor | None:
        self._skip_TF = super()._skipped(x_TD, block)
        return self._skip_TF

    def _ffn(self, x_TD: Tensor, block: str, skip_TF: Tensor | None) -> Tensor:
        assert self._skip_TF is not None
        first = self._first(x_TD, block)
        fired_TF, selected_TF = self._fired(first, block), ~self._skip_TF
        sums = [mask.sum(1) for mask in (fired_TF & selected_TF, fired_TF, selected_TF)]
        self._rows[_layer(block)].append(torch.stack(sums, 1))
        return self._down(first, block, ~fired_TF)


class Drawn(_Firing):
    """The engine with neurons selected at random."""

    def __init__(self, file: GGUFFile, threshold: float, rates: Sequence[Rates]) -> None:
        super().__init__(file, threshold)
        self._rates = rates
        self._generator = torch.Generator().manual_seed(0)

    def _skipped(self, x_TD: Tensor, block: str) -> None:
        """Skip nothing yet: `_ffn` draws once it knows which neurons fire."""

    def _ffn(self, x_TD: Tensor, block: str, skip_TF: Tensor | None) -> Tensor:
        first, rates = self._first(x_TD, block), self._rates[_layer(block)]
        fired_TF = self._fired(first, block)
        chance_TF = torch.rand(fired_TF.shape, generator=self._generator)
        skip_TF = torch.where(fired_TF, chance_TF >= rates.recall, chance_TF >= rates.false)
        return self._down(first, block, skip_TF)


def _layer(block: str) -> int:
    return int(block.removeprefix("blk."))
