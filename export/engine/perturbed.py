"""Re-evaluate a file with other roundings, and find the decisions that rounding may flip.

The engine's sums and ours differ by the last bits of float32. Where such a bit flips a rounding to
f16 or q8_0, or a predictor's decision, the logits of that position and of later ones differ by
whole steps, so no single evaluation is near the engine everywhere. Products perturbed by random
noise of that size flip at random, so at least one of a few such evaluations usually rounds as the
engine did.

Exact zeros stay zero. Where a quantized predictor's terms cancel, ties.py says what the engine
computes.

Shape letters: N sequences (in `_product` outputs), S sequence length, T tokens, D inputs, F FFN
width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsecast.export.engine.emulator import Emulator
from sparsecast.export.read.reader import GGUFFile

NOISE = 3e-7
"""Relative to the root mean square of a product's outputs: a few float32 roundings (6e-8 each)."""


class Perturbed(Emulator):
    """The engine's arithmetic with every product perturbed by a last bit or two, by `seed`."""

    def __init__(self, file: GGUFFile, seed: int) -> None:
        super().__init__(file)
        self._generator = torch.Generator().manual_seed(seed)

    def _product(self, x_TD: Tensor, name: str, skip_TD: Tensor | None = None) -> Tensor:
        y_TN = super()._product(x_TD, name, skip_TD)
        noise_TN = torch.randn(y_TN.shape, generator=self._generator)
        noise_TN *= NOISE * y_TN.square().mean(-1, keepdim=True).sqrt()
        return torch.where(y_TN == 0, y_TN, y_TN + noise_TN)


class Unrounded(Perturbed):
    """The same with inputs of products in float32, as some of the engine's CUDA kernels take them.

    Its kernel for one token and f16 weights does not round; the one for q4_0 rounds to q8_1, about
    as the CPU does (`ggml_cuda_mul_mat_sparse` of ggml-cuda.cu at d3ebd7c).
    """

    def _rounded(self, x_TD: Tensor, stored: str) -> Tensor:
        return x_TD


class Decision(NamedTuple):
    """A predictor's decision on one neuron of one token."""

    distance: float
    """Between the predictor's logit and the threshold."""
    layer: int
    neuron: int

    def __str__(self) -> str:
        return f"layer {self.layer} neuron {self.neuron} {self.distance:.1e} from the threshold"


NONE = Decision(float("inf"), 0, 0)


def closest_decisions(file: GGUFFile, ids_NS: Tensor) -> list[Decision]:
    """Find, for every position, the decision nearest to the threshold that it depends on.

    A position depends on its own decisions and on those of all tokens before it. Positions are
    listed sequence by sequence.
    """
    watched = _Watched(file)
    watched.logits(ids_NS)
    found, best = [], NONE
    for at in range(ids_NS.numel()):
        if at % ids_NS.shape[1] == 0:
            best = NONE
        here = (
            Decision(float(distance_T[at]), layer, int(neuron_T[at]))
            for layer, (distance_T, neuron_T) in enumerate(watched.closest)
        )
        best = min(best, *here)
        found.append(best)
    return found


class _Watched(Emulator):
    def __init__(self, file: GGUFFile) -> None:
        super().__init__(file)
        self.closest: list[tuple[Tensor, Tensor]] = []
        """Per layer: distance (T,) and neuron (T,)."""

    def predictor_logits(self, x_TD: Tensor, layer: int) -> Tensor:
        logits_TF = super().predictor_logits(x_TD, layer)
        least = torch.min((logits_TF - self.header.threshold).abs(), dim=-1)
        self.closest.append((least.values, least.indices))
        return logits_TF
