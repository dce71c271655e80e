"""ggml's blocks: 32 neighbours of a row share a scale. Torch alone, so that kernels may read it.

Shape letters: N rows, K columns, a multiple of 32.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32


def scales_and_codes(weight_NK: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """Of q8_0 or q4_0: scales (..., K / 32, 1) before their rounding to f16, and codes
    (..., K / 32, 32) with 0 for a weight of 0, both float32."""
    blocks = weight_NK.float().reshape(*weight_NK.shape[:-1], -1, BLOCK)
    if dtype == "q8_0":
        scale = blocks.abs().amax(-1, keepdim=True) / 127
        return scale, (blocks * _inverse(scale)).round()
    scale = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)) / -8
    return scale, (blocks * _inverse(scale) + 8.5).floor().clamp(0, 15) - 8


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale; 0 where that is no number, which stands for a block of zeros or nearly so."""
    inverse = 1 / scale
    return torch.where(inverse.isfinite(), inverse, 0.0)
