"""Weight formats of predictors in PowerInfer's file, and the rounding of its engine.

    f16     16 bits a weight; the input of a product is rounded to f16
    q8_0    8.5 bits: blocks of 32 along a row, w = d q, d = max |w| / 127 kept in f16
    q4_0    4.5 bits: the same with w = d (q - 8), q in 0..15, d = (the w of largest magnitude) / -8

The engine rounds the input of a product with q8_0 or q4_0 weights to q8_0 first. Both roundings are
idempotent, so rounded weights can be written to a file without further loss.
(ggml-quants.c of PowerInfer at d3ebd7c, `quantize_row_q8_0_reference` and
`quantize_row_q4_0_reference`, and the `vec_dot_type` of ggml.c's `type_traits`.)

Shape letters: N rows, K columns, a multiple of 32 for q8_0 and q4_0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsecast.core.compiled import compile_when_large
from sparsecast.core.errors import InputError
from sparsecast.core.ggml_blocks import BLOCK, quantize_blocks, round_to_q8_0
from sparsecast.core.models.shape import ModelShape

BITS = {"f16": 16.0, "q8_0": 8.5, "q4_0": 4.5}
"""Stored bits per weight, scales included."""


def share_of_ffn(rank: int, dtype: str, shape: ModelShape) -> float:
    """Bytes of one predictor, relative to its layer's FFN in f16."""
    d, f = shape.hidden_size, shape.ffn_width
    return rank * (d + f) * BITS[dtype] / (shape.ffn_matrices * d * f * 16)


def rounded(weight_NK: Tensor, dtype: str) -> Tensor:
    """Round weights to the values that a file of this format holds, float32."""
    if dtype == "f16":
        return weight_NK.half().float()
    scale, code = quantize_blocks(weight_NK, dtype)
    values: Tensor = code * scale.half().float()
    return values.flatten(-2)


def straight_through(weight_NK: Tensor, dtype: str) -> Tensor:
    """`rounded` with the gradient of the identity (Bengio et al., arXiv 1308.3432).

    On a GPU, values halfway between two codes may round the other way.
    """
    apply: Any = _StraightThrough.apply
    values: Tensor = apply(weight_NK, dtype)
    return values


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_NK: Tensor, dtype: str) -> Tensor:
        ctx.dtype = weight_NK.dtype
        return _rounded(weight_NK, dtype)

    @staticmethod
    def backward(ctx: Any, outer_NK: Tensor) -> tuple[Tensor, None]:
        return outer_NK.to(ctx.dtype), None


_rounded = compile_when_large(rounded)


def rounded_input(x_NK: Tensor, dtype: str) -> Tensor:
    """Round the input of a product with weights of this format, float32; any leading shape."""
    if dtype == "f16":
        return x_NK.half().float()
    return round_to_q8_0(x_NK)


def check_widths(dtype: str, *, rank: int, hidden_size: int) -> None:
    """Refuse rows that do not divide into blocks, which the engine would silently misread."""
    if dtype == "f16":
        return
    for name, width in (("rank", rank), ("hidden size", hidden_size)):
        if width % BLOCK:
            raise InputError(
                f"--predictor-dtype {dtype}: stores rows in blocks of {BLOCK}, but the {name} is "
                f"{width}; choose a multiple of {BLOCK}"
                + (" with --rank" if name == "rank" else ", or f16")
            )
