"""Products of q8_0 or q4_0 weights by inputs that are rounded to q8_0 as ggml rounds them.

A block's products are summed as integers, four per instruction (dp4a) or by the tensor cores, and
scaled once; blocks are added in float32. So a decision differs from that of PowerInfer's engine
only by the order of this last sum, which also depends on the number of tokens.

Codes are the signed integers of a format, packed into int32 words.

Shape letters: T tokens, N rows of a tile, K columns, B blocks of 32 columns, W words of half a
block, C words of a block, H halves of a block, S words of a quantized input block (STRIDE).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecast.core.ggml_blocks import BLOCK
from sparsecast.kernels.ops.compiler import tl, triton
from sparsecast.kernels.ops.launch import (
    INTERPRETED,
    after_previous,
    launch_options,
    padded_tokens,
    start_next,
)

STRIDE = 12
"""Words of a quantized input block: 8 with four codes each, the first code in the lowest byte, one
with the bits of the float32 scale, and 3 of padding, which align codes to 16 bytes."""
BLOCKS_PER_PROGRAM = 4
"""Input blocks that one program rounds."""
_INTERPRETED = tl.constexpr(INTERPRETED)
_STRIDE = tl.constexpr(STRIDE)


def quantize_input(x_TK: Tensor, *, early: bool = False) -> Tensor:
    """Round an input of any float dtype to q8_0, (T, B, STRIDE) int32, by the rule of
    `quantize_q8_0_input`.

    Args:
        early: Whether the next kernel may start before x is written (launch.py).

    Raises:
        ValueError: The number of tokens is not 1 to 16.
    """
    tokens, columns = x_TK.shape
    padded_tokens(tokens)
    shape = (tokens, columns // BLOCK, STRIDE)
    rounded_TBS = torch.empty(shape, dtype=torch.int32, device=x_TK.device)
    grid = (triton.cdiv(columns // BLOCK, BLOCKS_PER_PROGRAM), tokens)
    _kernel[grid](
        x_TK,
        rounded_TBS,
        K=columns,
        EARLY=early,
        BLOCK_B=BLOCKS_PER_PROGRAM,
        num_warps=1,
        **launch_options(x_TK),
    )
    return rounded_TBS


@triton.jit
def _kernel(x, out, K: tl.constexpr, EARLY: tl.constexpr, BLOCK_B: tl.constexpr, PDL: tl.constexpr):
    if EARLY:
        start_next(PDL)
    after_previous(PDL)
    if not EARLY:
        start_next(PDL)
    t = tl.program_id(1)
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    k_BC4 = (b[:, None] * 32 + tl.arange(0, 8)[None, :] * 4)[:, :, None] + tl.arange(0, 4)
    x_BC4 = tl.load(x + t * K + k_BC4, mask=k_BC4 < K, other=0.0)
    code_BC, scale_B = _quantize(x_BC4.to(tl.float32))
    place_B = (t * (K // 32) + b) * _STRIDE
    ok_B = b < K // 32
    tl.store(out + place_B[:, None] + tl.arange(0, 8)[None, :], code_BC, mask=ok_B[:, None])
    tl.store(out + place_B + 8, scale_B.to(tl.float32).to(tl.int32, bitcast=True), mask=ok_B)


@triton.jit
def _quantize(x_BC4):
    """Convert (B, 8, 4) float32 to (B, 8) words of codes and (B,) float16 scales."""
    largest_B = tl.max(tl.max(tl.abs(x_BC4), 2), 1)
    some_B = largest_B > 127 * 2.0**-128  # else 127 / largest is infinite; the codes are 0
    inverse_B = tl.div_rn(
        tl.where(some_B, 127.0, 0.0).to(tl.float32), tl.where(some_B, largest_B, 1.0)
    )
    byte_BC4 = _nearest(x_BC4 * inverse_B[:, None, None]) & 255
    word_BC = tl.sum(byte_BC4 << (8 * tl.arange(0, 4))[None, None, :], 2)
    scale_B = tl.div_rn(largest_B, tl.full(largest_B.shape, 127.0, tl.float32))
    return word_BC, scale_B.to(tl.float16)


@triton.jit
def int8_products(
    code,
    scale,
    row_N,
    ok_N,
    x,
    tokens,
    K: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    T: tl.constexpr,
    PDL: tl.constexpr,
):
    """Multiply the rows `row_N` of a quantized weight by a quantized input of `tokens` rows and K
    columns; return (N, T) float32.

    Rows that are not ok are not read, and their products are 0. Up to 4 tokens are multiplied in
    registers, more by the tensor cores. With PDL this waits until x is written (launch.py); up to 4
    tokens it requests all weights before that.
    """
    row_N = row_N.to(tl.int64)
    N: tl.constexpr = row_N.shape[0]
    BLOCK_B: tl.constexpr = BLOCK_K // 32
    if T <= 4:
        tiles = ()
        for start in tl.static_range(0, K // 32, BLOCK_B):
            tile = _weight_words(code, scale, row_N, ok_N, start, K, BITS, BLOCK_B)
            tiles = tiles + (tile,)  # type: ignore[assignment]  # a tuple that grows
        after_previous(PDL)
        acc_TNB = tl.zeros((T, N, BLOCK_B), tl.float32)
        for start in tl.static_range(0, K // 32, BLOCK_B):
            acc_TNB += _word_products(tiles[start // BLOCK_B], start, x, tokens, K, T)
        return tl.trans(tl.sum(acc_TNB, 2))
    after_previous(PDL)
    acc_BNT = tl.zeros((BLOCK_B, N, T), tl.float32)
    for start in tl.range(0, K // 32, BLOCK_B, num_stages=STAGES):
        w_BN32, d_BN = _weight_bytes(code, scale, row_N, ok_N, start, K, BITS, BLOCK_B)
        x_B32T, scale_BT = _input_bytes(x, start, tokens, K, BLOCK_B, T)
        scale_BNT = d_BN[:, :, None] * scale_BT[:, None, :]
        acc_BNT += _dot(w_BN32, x_B32T).to(tl.float32) * scale_BNT
    return tl.sum(acc_BNT, 0)


@triton.jit
def _weight_words(
    code, scale, row_N, ok_N, start, K: tl.constexpr, BITS: tl.constexpr, BLOCK_B: tl.constexpr
):
    """Load the first and the last 16 codes of each block, as words of signed bytes, and the scales.

    A 4-bit code stands in the high half of its byte, as 16 times its value; the scale is divided by
    16.
    """
    b = start + tl.arange(0, BLOCK_B)
    ok_NB = ok_N[:, None] & (b < K // 32)[None, :]
    block_NB = row_N[:, None] * (K // 32) + b[None, :]
    d_NB = tl.load(scale + block_NB, mask=ok_NB, other=0.0).to(tl.float32)
    place_NBW = block_NB[:, :, None] * BITS + tl.arange(0, 4)[None, None, :]
    first_NBW = tl.load(code + place_NBW, mask=ok_NB[:, :, None], other=0)
    if BITS == 8:
        return first_NBW, tl.load(code + place_NBW + 4, mask=ok_NB[:, :, None], other=0), d_NB
    HIGH: tl.constexpr = -0x0F0F0F10  # 0xF0F0F0F0
    return (first_NBW << 4) & HIGH, first_NBW & HIGH, d_NB * 0.0625


@triton.jit
def _word_products(tile, start, x, tokens, K: tl.constexpr, T: tl.constexpr):
    """Sum the products of each block, (T, N, B) float32."""
    low_NBW, high_NBW, d_NB = tile
    N: tl.constexpr = low_NBW.shape[0]
    BLOCK_B: tl.constexpr = low_NBW.shape[1]
    b = start + tl.arange(0, BLOCK_B)
    t = tl.arange(0, T)[:, None, None]
    ok_TNB = tl.broadcast_to((t < tokens) & (b < K // 32)[None, None, :], (T, N, BLOCK_B))
    # Each thread loads the input words that its own weights need, so threads exchange nothing.
    place_TNB = tl.broadcast_to(t * (K // 32) + b[None, None, :], (T, N, BLOCK_B)) * _STRIDE
    x_TNBW = x + (place_TNB[:, :, :, None] + tl.arange(0, 4)[None, None, None, :])
    ok_TNBW = ok_TNB[:, :, :, None]
    sum_TNBW = tl.zeros((T, N, BLOCK_B, 4), tl.int32)
    sum_TNBW = _dp4a(low_NBW[None], tl.load(x_TNBW, mask=ok_TNBW, other=0), sum_TNBW)
    sum_TNBW = _dp4a(high_NBW[None], tl.load(x_TNBW + 4, mask=ok_TNBW, other=0), sum_TNBW)
    scale_TNB = tl.load(x + place_TNB + 8, mask=ok_TNB, other=0).to(tl.float32, bitcast=True)
    return tl.sum(sum_TNBW, 3).to(tl.float32) * (scale_TNB * d_NB[None])


@triton.jit
def _weight_bytes(
    code, scale, row_N, ok_N, start, K: tl.constexpr, BITS: tl.constexpr, BLOCK_B: tl.constexpr
):
    """Load a tile of codes, (B, N, 32) int8, and scales, (B, N). For 4-bit codes see
    `_weight_words`."""
    b = start + tl.arange(0, BLOCK_B)
    ok_BN = (b < K // 32)[:, None] & ok_N[None, :]
    block_BN = row_N[None, :] * (K // 32) + b[:, None]
    d_BN = tl.load(scale + block_BN, mask=ok_BN, other=0.0).to(tl.float32)
    byte = code.to(tl.pointer_type(tl.int8), bitcast=True) + (block_BN * (4 * BITS))[:, :, None]
    if BITS == 8:
        return tl.load(byte + tl.arange(0, 32), mask=ok_BN[:, :, None], other=0), d_BN
    pair_BN16 = tl.load(byte + tl.arange(0, 16), mask=ok_BN[:, :, None], other=0)
    w_BNH16 = tl.permute(tl.join(pair_BN16 << 4, pair_BN16 & -16), (0, 1, 3, 2))
    return tl.reshape(w_BNH16, (BLOCK_B, row_N.shape[0], 32)), d_BN * 0.0625


@triton.jit
def _input_bytes(x, start, tokens, K: tl.constexpr, BLOCK_B: tl.constexpr, T: tl.constexpr):
    """Load a tile of input codes of all tokens, (B, 32, T) int8, and their scales, (B, T)."""
    b = start + tl.arange(0, BLOCK_B)
    t = tl.arange(0, T)
    ok_BT = (b < K // 32)[:, None] & (t < tokens)[None, :]
    place_BT = (t[None, :] * (K // 32) + b[:, None]) * _STRIDE
    byte = x.to(tl.pointer_type(tl.int8), bitcast=True) + (4 * place_BT)[:, None, :]
    x_B32T = tl.load(byte + tl.arange(0, 32)[:, None], mask=ok_BT[:, None, :], other=0)
    scale_BT = tl.load(x + place_BT + 8, mask=ok_BT, other=0)
    return x_B32T, scale_BT.to(tl.float32, bitcast=True)


@triton.jit
def _dot(a, b):
    """Return a @ b of int8, in int32."""
    if _INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee").to(tl.int32)
    return tl.dot(a, b, out_dtype=tl.int32)


@triton.jit
def _dp4a(a, b, acc):
    """Return acc plus the dot products of four signed bytes each, int32."""
    if _INTERPRETED:
        for byte in tl.static_range(4):
            acc += ((a << (24 - 8 * byte)) >> 24) * ((b << (24 - 8 * byte)) >> 24)
        return acc
    return tl.inline_asm_elementwise(
        "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, acc], tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _nearest(x):
    """Round float32 below 2^22 to the nearest int32, ties to even."""
    if _INTERPRETED:
        return ((x + 12582912.0) - 12582912.0).to(tl.int32)
    return tl.inline_asm_elementwise(
        "cvt.rni.s32.f32 $0, $1;", "=r,r", [x], tl.int32, is_pure=True, pack=1
    )
