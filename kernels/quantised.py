"""Predictor weights in q8_0 and q4_0, laid out for a GPU: codes and scales as two tensors.

A thread takes a unit of 16 bytes: 4 words of 32 bits. Field p of word w, counted from the lowest
bits, is the code of the unit's column 4 p + w, so that one mask gives four neighbours. Codes are
unsigned: q8_0's are kept plus 128.

Codes and scales are ggml's (predictors/blocks.py). Quantising is idempotent, so values that were
rounded to a format once get the codes that stand in PowerInfer's file.

Shape letters: N rows, K columns, a multiple of 32, B = K / 32 blocks of a row, C words of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsecast.predictors.blocks import BLOCK, scales_and_codes

WORDS = 4
"""Of a unit."""


class Quantised(NamedTuple):
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
    scale, code = scales_and_codes(weight_NK, dtype)
    bits = 8 if dtype == "q8_0" else 4
    unsigned_NK = (code + (1 << bits - 1)).flatten(1)
    return Quantised(_packed(unsigned_NK, bits), scale.squeeze(-1).half().contiguous())


def dequantised(weight: Tensor | Quantised) -> Tensor:
    """(N, K) float32: the values that the format holds; of a plain tensor, its own."""
    if isinstance(weight, Tensor):
        return weight.float()
    code_NK = _unpacked(weight.code_NC, weight.bits) - (1 << weight.bits - 1)
    blocks = code_NK.float().reshape(len(code_NK), -1, BLOCK)
    return (blocks * weight.scale_NB.float().unsqueeze(-1)).flatten(1)


def _packed(code_NK: Tensor, bits: int) -> Tensor:
    fields = code_NK.int().reshape(len(code_NK), -1, 32 // bits, WORDS)
    shift = torch.arange(0, 32, bits, dtype=torch.int32, device=code_NK.device)
    words: Tensor = (fields << shift[:, None]).sum(2, dtype=torch.int32)
    return words.flatten(1).contiguous()


def _unpacked(code_NC: Tensor, bits: int) -> Tensor:
    words = code_NC.reshape(len(code_NC), -1, 1, WORDS)
    shift = torch.arange(0, 32, bits, dtype=torch.int32, device=code_NC.device)
    fields: Tensor = (words >> shift[:, None]) & (2**bits - 1)
    return fields.flatten(1)
