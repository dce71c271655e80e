"""ggml's quantized blocks: 32 neighbors in a row of a weight or an input share a scale.

It needs torch alone, so that kernels may read it.

Shape letters: N rows, K columns, a multiple of 32.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32


def quantize_blocks(weight_NK: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """Quantize rows to the blocks of `dtype`, "q8_0" or "q4_0".

    Returns:
        Scales (..., K / 32, 1) before their rounding to f16, and codes (..., K / 32, 32) with 0 for
        a weight of 0, both float32.
    """
    assert dtype in ("q8_0", "q4_0"), dtype
    blocks = weight_NK.float().reshape(*weight_NK.shape[:-1], -1, BLOCK)
    if dtype == "q8_0":
        scale = blocks.abs().amax(-1, keepdim=True) / 127
        return scale, (blocks * _inverse(scale)).round()
    scale = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)) / -8
    return scale, (blocks * _inverse(scale) + 8.5).floor().clamp(0, 15) - 8


def quantize_q8_0_input(x_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize a product's input: scales (N, K / 32), codes (N, K / 32, 32), both float32.

    Codes are x (127 / max), as in the engine's vector code: 5 million random inputs gave the same
    codes. x (1 / (max / 127)), the reference code's rule for weights, differs at one input in a
    million, and so does 127 times a reciprocal, which is how torch divides a number by a tensor.
    """
    blocks = x_NK.float().reshape(*x_NK.shape[:-1], -1, BLOCK)
    largest = blocks.abs().amax(-1, keepdim=True)
    inverse = torch.full_like(largest, 127).div(largest)
    codes = (blocks * torch.where(inverse.isfinite(), inverse, 0.0)).round()
    return (largest[..., 0] / 127).half().float(), codes


def round_to_q8_0(x_NK: Tensor) -> Tensor:
    """Round an input to the values of its q8_0 codes, float32, of x's shape."""
    scale_NB, code_NBC = quantize_q8_0_input(x_NK)
    return (code_NBC * scale_NB[..., None]).flatten(-2)


def _inverse(scale: Tensor) -> Tensor:
    """Return 1 / scale; 0 where that is not finite, as in a block of zeros."""
    inverse = 1 / scale
    return torch.where(inverse.isfinite(), inverse, 0.0)
