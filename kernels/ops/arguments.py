"""Checks of the operators' arguments. An error is one line: the name, its value and what fits."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecast.core.ggml_blocks import BLOCK
from sparsecast.kernels.ops.compiler import require_triton
from sparsecast.kernels.ops.launch import padded_tokens
from sparsecast.kernels.ops.quantized import Quantized

HALVES = (torch.float16, torch.bfloat16)


def check_input(x_TD: Tensor, d: int) -> None:
    """Refuse anything but 1 to 16 tokens of width `d` in 16 bits, and all without Triton."""
    require_triton()
    if x_TD.dim() != 2 or x_TD.shape[1] != d or x_TD.dtype not in HALVES:
        raise ValueError(
            f"x: is {tuple(x_TD.shape)} in {x_TD.dtype}, expected (tokens, {d}) in float16 or "
            "bfloat16"
        )
    padded_tokens(len(x_TD))


def check_weight(
    name: str,
    weight: Tensor,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    """Refuse another shape, dtype or device, and what is not contiguous."""
    if tuple(weight.shape) != shape:
        raise ValueError(f"{name}: is {tuple(weight.shape)}, expected {shape}")
    if weight.dtype not in dtypes or weight.device != device:
        raise ValueError(
            f"{name}: is {weight.dtype} on {weight.device}, expected "
            f"{' or '.join(map(str, dtypes))} on {device}"
        )
    if not weight.is_contiguous():
        raise ValueError(f"{name}: is not contiguous; call .contiguous() once at load time")


def check_quantized(
    name: str, weight: Quantized, shape: tuple[int, int], device: torch.device
) -> None:
    """Refuse blocks that do not hold a matrix of this shape."""
    rows, columns = shape
    if columns % BLOCK:
        raise ValueError(f"{name}: rows of {columns} do not divide into blocks of {BLOCK}; use f16")
    scales = (rows, columns // BLOCK)
    check_weight(f"{name}.scale_NB", weight.scale_NB, scales, (torch.float16,), device)
    codes = (rows, columns * weight.bits // 32)
    check_weight(f"{name}.code_NC", weight.code_NC, codes, (torch.int32,), device)
