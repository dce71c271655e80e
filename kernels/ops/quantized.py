"""Predictor weights in q8_0 and q4_0, laid out for a GPU: codes and scales as two tensors.

Codes and scales are ggml's (core/ggml_blocks.py). Codes are signed and in ggml's order, four bytes
to an int32 word, the first in the lowest byte. A byte of q8_0 is one code; byte j of a q4_0 block
holds the code of column j in its low half and of column 16 + j in its high half. Quantization is
idempotent: values that were rounded to a format before get the codes of PowerInfer's file.

Shape letters: N rows, K columns (a multiple of 32), B = K / 32 blocks of a row, C words of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsecast.core.ggml_blocks import BLOCK, quantize_blocks


class Quantized(NamedTuple):
    """A matrix (N, K) in q8_0 or q4_0."""

    code_NC: Tensor
    """int32; C is 8 B in q8_0 and 4 B in q4_0."""
    scale_NB: Tensor
    """float16."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.scale_NB.shape[0], self.scale_NB.shape[1] * BLOCK

    @property
    def bits(self) -> int:
        """Bits of a code, 8 or 4."""
        return 4 if self.code_NC.shape[1] == 4 * self.scale_NB.shape[1] else 8

    @property
    def nbytes(self) -> int:
        return self.code_NC.nbytes + self.scale_NB.nbytes


def quantized(weight_NK: Tensor, dtype: str) -> Quantized:
    """Quantize a matrix to `dtype`, "q8_0" or "q4_0".

    Raises:
        ValueError: The rows do not divide into blocks of 32, or `dtype` is neither.
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
    """Return the values of a matrix, (N, K) float32."""
    if isinstance(weight, Tensor):
        return weight.float()
    scale_NB = weight.scale_NB
    code_NBK = weight.code_NC.view(torch.int8).view(*scale_NB.shape, -1)
    if weight.bits == 4:
        code_NBK = torch.cat([code_NBK << 4, code_NBK], -1) >> 4
    return (code_NBK * scale_NB.float().unsqueeze(-1)).flatten(1)
