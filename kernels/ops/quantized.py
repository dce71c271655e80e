"""Predictor weights in q8_0 and q4_0, laid out for a GPU: codes and scales as two tensors.

Codes and scales are ggml's (core/ggml_blocks.py), signed and in ggml's order, four bytes to a
word, the first lowest: a byte of q8_0 is a code; byte j of a block of q4_0 holds the code of column
j in its low half and that of column 16 + j in its high half. Quantizing is idempotent, so values
that were rounded to a format once get the codes that stand in PowerInfer's file.

Shape letters: N rows, K columns, a multiple of 32, B = K / 32 blocks of a row, C words of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsecast.core.ggml_blocks import BLOCK, quantize_blocks


class Quantized(NamedTuple):
    """A matrix (N, K) in blocks of 32."""

    code_NC: Tensor
    """int32, C = 8 B in q8_0, 4 B in q4_0."""
    scale_NB: Tensor
    """float16."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.scale_NB.shape[0], self.scale_NB.shape[1] * BLOCK

    @property
    def bits(self) -> int:
        """Of a code."""
        return 4 if self.code_NC.shape[1] == 4 * self.scale_NB.shape[1] else 8

    @property
    def nbytes(self) -> int:
        return self.code_NC.nbytes + self.scale_NB.nbytes


def quantized(weight_NK: Tensor, dtype: str) -> Quantized:
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
    scale_NB1, code_NB32 = quantize_blocks(weight_NK, dtype)
    code_NBK = code_NB32.to(torch.int8)
    if dtype == "q4_0":
        low_NBK, high_NBK = code_NBK.chunk(2, -1)
        code_NBK = low_NBK & 15 | high_NBK << 4
    code_NK = code_NBK.flatten(1).contiguous()
    return Quantized(code_NK.view(torch.int32), scale_NB1.squeeze(-1).half().contiguous())


def dequantized(weight: Tensor | Quantized) -> Tensor:
    """(N, K) float32: the values that the format holds; of a plain tensor, its own."""
    if isinstance(weight, Tensor):
        return weight.float()
    scale_NB = weight.scale_NB
    code_NBK = weight.code_NC.view(torch.int8).view(*scale_NB.shape, -1)
    if weight.bits == 4:
        code_NBK = torch.cat([code_NBK << 4, code_NBK], -1) >> 4
    return (code_NBK * scale_NB.float().unsqueeze(-1)).flatten(1)
