"""Our evaluation of a file again, as other orders of summation would have it.

The engine's sums and ours differ by the last bits of float32. Where such a bit turns a rounding to
f16 or q8_0 over, or a predictor's decision, the logits of that position and of later ones differ by
whole steps, so no single evaluation is near the engine everywhere. Products moved by random noise
of that size take such turns at random, and one of a few evaluations takes the engine's.

Exact zeros stay; where a quantized predictor's terms cancel, ties.py says what the engine has.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecast.export.engine.emulator import Emulator
from sparsecast.export.read.reader import GGUFFile

SIZE = 3e-7
"""Of the root mean square of a product's outputs: a few roundings of float32 (6e-8 each)."""


class Nudged(Emulator):
    """The engine's arithmetic with products off by a last bit or two; `seed` says which."""

    def __init__(self, file: GGUFFile, seed: int) -> None:
        super().__init__(file)
        self._generator = torch.Generator().manual_seed(seed)

    def _product(self, x_TD: Tensor, name: str, skip_TD: Tensor | None = None) -> Tensor:
        y_TN = super()._product(x_TD, name, skip_TD)
        noise_TN = torch.randn(y_TN.shape, generator=self._generator)
        noise_TN *= SIZE * y_TN.square().mean(-1, keepdim=True).sqrt()
        return torch.where(y_TN == 0, y_TN, y_TN + noise_TN)
