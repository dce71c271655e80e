"""Products of weight rows with 1 to 16 tokens, inside a kernel, for every weight format.

One token is a sum of products in registers, more go through the tensor cores. The tokens are
rounded to the weights' 16-bit type (float16 beside codes), sums are float32.

Shape letters: N rows of a tile, K columns of a weight, B blocks of 32 of a row, T tokens as padded.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparsecast.kernels.launch import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """float32 to the nearest of a 16-bit type, ties to even."""
    if _INTERPRETED and dtype == tl.bfloat16:  # the interpreter's own conversion cuts bits off
        bits = value.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        value = bits.to(tl.float32, bitcast=True)
    return value.to(dtype)


@triton.jit
def dot(a, b, acc):
    """acc + a @ b in float32."""
    if _INTERPRETED:  # which would multiply the bit patterns of bfloat16
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc)


@triton.jit
def products(
    weight,
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
):
    """(N, T) float32: the rows `row_N` of a weight in 16, 8 or 4 bits times x (tokens, K).

    Rows that are not ok are not read; their products are 0. `scale` is unused for 16 bits. STAGES
    is how many tiles of BLOCK_K columns are on their way at once.
    """
    row_N = row_N.to(tl.int64)
    if BITS == 16:
        return _plain(weight, row_N, ok_N, x, tokens, K, BLOCK_K, STAGES, T)
    return _blocks(weight, scale, row_N, ok_N, x, tokens, K, BITS, BLOCK_K, STAGES, T)


@triton.jit
def _plain(
    weight,
    row_N,
    ok_N,
    x,
    tokens,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    T: tl.constexpr,
):
    dtype: tl.constexpr = weight.dtype.element_ty
    if T == 1:
        acc_NK = tl.zeros((row_N.shape[0], BLOCK_K), tl.float32)
    else:
        acc_NT = tl.zeros((row_N.shape[0], T), tl.float32)
    t = tl.arange(0, T)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)
        w_NK = tl.load(
            weight + row_N[:, None] * K + k[None, :],
            mask=ok_N[:, None] & (k < K)[None, :],
            other=0.0,
        )
        if T == 1:
            x_K = rounded(tl.load(x + k, mask=k < K, other=0.0).to(tl.float32), dtype)
            acc_NK += w_NK.to(tl.float32) * x_K.to(tl.float32)[None, :]
        else:
            x_KT = tl.load(
                x + t[None, :] * K + k[:, None],
                mask=(t < tokens)[None, :] & (k < K)[:, None],
                other=0.0,
            )
            acc_NT = dot(w_NK, _as(x_KT, dtype), acc_NT)
    if T == 1:
        acc_NT = tl.sum(acc_NK, 1)[:, None]
    return acc_NT


@triton.jit
def _blocks(
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
):
    """q8_0 and q4_0. A block's bytes stay in one thread; q4_0 goes half block by half block."""
    BLOCKS: tl.constexpr = K // 32
    BLOCK_B: tl.constexpr = BLOCK_K // 32
    BYTES: tl.constexpr = 4 * BITS
    rows: tl.constexpr = row_N.shape[0]
    if T == 1:
        acc_NB = tl.zeros((rows, BLOCK_B), tl.float32)
    else:
        acc_NT = tl.zeros((rows, T), tl.float32)
    j = tl.arange(0, BYTES)
    for start in tl.range(0, BLOCKS, BLOCK_B, num_stages=STAGES):
        b = start + tl.arange(0, BLOCK_B)
        ok_NB = ok_N[:, None] & (b < BLOCKS)[None, :]
        d_NB = tl.load(scale + row_N[:, None] * BLOCKS + b[None, :], mask=ok_NB, other=0.0)
        d_NB = d_NB.to(tl.float32)
        place = (row_N[:, None] * BLOCKS + b[None, :]) * BYTES
        code_NBJ = tl.load(
            code + place[:, :, None] + j[None, None, :], mask=ok_NB[:, :, None], other=0
        )
        for half in tl.static_range(8 // BITS):
            if BITS == 8:
                q_NBJ = code_NBJ.to(tl.float32)
            else:
                # In 32 bits: masked as bytes, Triton 3.6 gave wrong codes in one configuration.
                q_NBJ = (((code_NBJ.to(tl.int32) >> (4 * half)) & 15) - 8).to(tl.float32)
            if T == 1:
                k_BJ = (b * 32 + half * BYTES)[:, None] + j[None, :]
                x_BJ = tl.load(x + k_BJ, mask=(b < BLOCKS)[:, None], other=0.0)
                x_BJ = _as(x_BJ, tl.float16).to(tl.float32)
                acc_NB += tl.sum(q_NBJ * x_BJ[None, :, :], 2) * d_NB
            else:
                w_NK = tl.reshape(
                    rounded(q_NBJ * d_NB[:, :, None], tl.float16), (rows, BLOCK_B * BYTES)
                )
                i = tl.arange(0, BLOCK_B * BYTES)
                k = (start + i // BYTES) * 32 + half * BYTES + i % BYTES
                t = tl.arange(0, T)
                x_KT = tl.load(
                    x + t[None, :] * K + k[:, None],
                    mask=(t < tokens)[None, :] & (k < K)[:, None],
                    other=0.0,
                )
                acc_NT = dot(w_NK, _as(x_KT, tl.float16), acc_NT)
    if T == 1:
        acc_NT = tl.sum(acc_NB, 1)[:, None]
    return acc_NT


@triton.jit
def _as(x, dtype: tl.constexpr):
    """A 16-bit or float32 tensor in another type, unless it has it already."""
    if x.dtype == dtype:
        return x
    return rounded(x.to(tl.float32), dtype)
