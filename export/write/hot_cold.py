"""Choose the neurons that a GPU build of PowerInfer keeps in GPU memory.

PowerInfer's problem (powerinfer-py/solver.py at d3ebd7c): sort the counts of each layer from the
hottest neuron down, sum them in blocks of 256, and choose at most n blocks over all layers with the
greatest total; a layer with k of them keeps its 256 k hottest neurons. PowerInfer solves an integer
program. Taking the n largest block sums of all layers solves the same problem exactly:

    Within a layer the sums never rise. So the n largest, with ties taken in order, are the first k
    blocks of each layer, and their total counts its 256 k hottest neurons. No other n blocks and no
    other 256 k neurons of a layer have a greater total.

The choice fills the memory even with neurons that never fired in the recording: a layer that is
whole on the GPU needs no second half on the CPU. Counts are summed as int64.

Shape letters: L layers, F FFN width, B blocks of a layer, K neurons on the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsecast.core.errors import InputError
from sparsecast.export.write.vram import Budget

BLOCK = 256
"""PowerInfer's --batch: neurons move to the GPU in blocks of this size."""


@dataclass(frozen=True)
class Split:
    """The neurons on the GPU, their memory and their share of activations."""

    hot: list[Tensor]
    """Per layer (K,) int64, ascending; K is a multiple of 256 and may be 0."""
    width: int
    """F: all neurons of a layer."""
    share: float
    """Share of all recorded activations that the hot neurons have."""
    budget: Budget

    @property
    def neurons(self) -> int:
        return sum(len(hot_K) for hot_K in self.hot)

    @property
    def nbytes(self) -> int:
        return self.neurons * self.budget.neuron

    @property
    def partial(self) -> bool:
        """Whether a layer is split between GPU and CPU."""
        return any(0 < len(hot_K) < self.width for hot_K in self.hot)


def check_width(width: int) -> None:
    """Refuse an FFN width that is not a multiple of the block size."""
    if width % BLOCK:
        raise InputError(
            f"--vram-budget: PowerInfer moves neurons to the GPU in blocks of {BLOCK}, but the FFN "
            f"is {width} wide; export without --vram-budget, the FFN then stays on the CPU"
        )


def split_for(budget: Budget, counts: list[Tensor]) -> Split:
    """Return the best split; it is empty where no block fits.

    Args:
        counts: Per layer (F,) int64: the number of tokens on which each neuron fired.
    """
    blocks = blocks_per_layer(counts, max(budget.room, 0) // (BLOCK * budget.neuron))
    hot = [hottest(count_F, k * BLOCK) for count_F, k in zip(counts, blocks, strict=True)]
    fired = sum(int(count_F.sum()) for count_F in counts)
    kept = sum(int(count_F[hot_K].sum()) for count_F, hot_K in zip(counts, hot, strict=True))
    return Split(hot, len(counts[0]), kept / fired if fired else 0.0, budget)


def blocks_per_layer(counts: list[Tensor], n: int) -> list[int]:
    """Return how many blocks of each layer are among the `n` with the greatest total."""
    ordered_LF = torch.stack(counts).sort(dim=1, descending=True).values
    sum_LB = ordered_LF.view(len(counts), -1, BLOCK).sum(-1)
    best = sum_LB.flatten().argsort(descending=True, stable=True)[:n]
    return torch.bincount(best // sum_LB.shape[1], minlength=len(counts)).tolist()


def hottest(count_F: Tensor, k: int) -> Tensor:
    """Return the (k,) indices of the k greatest counts, ascending; ties go to the first."""
    order_F = count_F.argsort(descending=True, stable=True)
    return order_F[:k].sort().values
