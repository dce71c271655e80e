"""Predictor weights in q8_0 and q4_0, laid out for a GPU: codes and scales as two tensors.

The formats are ggml's (ggml-quants.c, `quantize_row_q8_0_reference` and its sister of q4_0): blocks
of 32 along a row, w = d q with d = max |w| / 127 in q8_0, w = d (q - 8) with d = (the w of largest
magnitude) / -8 in q4_0, d kept in float16. Quantising is idempotent, so values that were rounded to
a format once get the codes that stand in PowerInfer's file.

Shape letters: N rows, K columns, a multiple of 32, B = K / 32 blocks of a row, C codes of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 32


class Quantised(NamedTuple):
    """A matrix (N, K) in blocks of 32."""

    code_NC: Tensor
    """q8_0: int8, C = K. q4_0: uint8, C = K / 2; byte j of a block holds its codes j and, in the
    high half, j + 16, as in ggml."""
    scale_NB: Tensor
    """float16."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.scale_NB.shape[0], self.scale_NB.shape[1] * BLOCK

    @property
    def is_q4_0(self) -> bool:
        return self.code_NC.dtype == torch.uint8

    @property
    def nbytes(self) -> int:
        return self.code_NC.nbytes + self.scale_NB.nbytes


def quantised(weight_NK: Tensor, dtype: str) -> Quantised:
    """The codes and scales of a matrix in `dtype`, "q8_0" or "q4_0".

    Raises:
        ValueError: The rows do not divide into blocks of 32, or the format is another.
    """
    if dtype not in ("q8_0", "q4_0"):
        raise ValueError(f"dtype: got {dtype!r}, expected 'q8_0' or 'q4_0'")
    if weight_NK.dim() != 2 or weight_NK.shape[1] % BLOCK:
        raise ValueError(
            f"weight: {dtype} stores rows in blocks of {BLOCK}, but its shape is "
            f"{tuple(weight_NK.shape)}; use f16 weights instead"
        )
    blocks = weight_NK.float().reshape(len(weight_NK), -1, BLOCK)
    if dtype == "q8_0":
        scale = blocks.abs().amax(-1, keepdim=True) / 127
        code = (blocks * _inverse(scale)).round().to(torch.int8).flatten(1)
    else:
        scale = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)) / -8
        nibble = (blocks * _inverse(scale) + 8.5).floor().clamp(0, 15).to(torch.uint8)
        code = (nibble[..., :16] | nibble[..., 16:] << 4).flatten(1)
    return Quantised(code.contiguous(), scale.squeeze(-1).half().contiguous())


def dequantised(weight: Tensor | Quantised) -> Tensor:
    """(N, K) float32: the values that the format holds; of a plain tensor, its own."""
    if isinstance(weight, Tensor):
        return weight.float()
    if weight.is_q4_0:
        byte = weight.code_NC.reshape(len(weight.code_NC), -1, BLOCK // 2)
        code = torch.cat([byte & 15, byte >> 4], -1).float() - 8
    else:
        code = weight.code_NC.reshape(len(weight.code_NC), -1, BLOCK).float()
    return (code * weight.scale_NB.float().unsqueeze(-1)).flatten(1)


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0.0, 1 / scale)
