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
    n_rows,
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

    Rows that are not ok are not read; their products are 0. `scale` and `n_rows`, the rows of the
    whole weight, are unused for 16 bits. STAGES is how many tiles of BLOCK_K columns are on their
    way at once.
    """
    row_N = row_N.to(tl.int64)
    if BITS == 16:
        return _plain(weight, row_N, ok_N, x, tokens, K, BLOCK_K, STAGES, T)
    if BITS == 4 and T == 1:
        return _nibbles(weight, scale, n_rows, row_N, ok_N, x, K, BLOCK_K)
    return _blocks(weight, scale, n_rows, row_N, ok_N, x, tokens, K, BITS, BLOCK_K, STAGES, T)


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
    n_rows,
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
    """q8_0 and q4_0, as quantised.py lays them out; q4_0 goes half block by half block."""
    BLOCKS: tl.constexpr = K // 32
    BLOCK_B: tl.constexpr = BLOCK_K // 32
    BYTES: tl.constexpr = 4 * BITS
    rows: tl.constexpr = row_N.shape[0]
    if T == 1:
        acc_BN = tl.zeros((BLOCK_B, rows), tl.float32)
    else:
        acc_NT = tl.zeros((rows, T), tl.float32)
    j = tl.arange(0, BYTES)
    for start in tl.range(0, BLOCKS, BLOCK_B, num_stages=STAGES):
        b = start + tl.arange(0, BLOCK_B)
        ok_BN = (b < BLOCKS)[:, None] & ok_N[None, :]
        place_BN = b[:, None] * n_rows + row_N[None, :]
        d_BN = tl.load(scale + place_BN, mask=ok_BN, other=0.0).to(tl.float32)
        code_BNJ = tl.load(
            code + place_BN[:, :, None] * BYTES + j[None, None, :], mask=ok_BN[:, :, None], other=0
        )
        for half in tl.static_range(8 // BITS):
            if BITS == 8:
                q_BNJ = code_BNJ.to(tl.float32)
            elif half == 0:
                q_BNJ = ((code_BNJ & 15).to(tl.int32) - 8).to(tl.float32)
            else:
                q_BNJ = ((code_BNJ >> 4).to(tl.int32) - 8).to(tl.float32)
            if T == 1:
                k_BJ = (b * 32 + half * BYTES)[:, None] + j[None, :]
                x_BJ = tl.load(x + k_BJ, mask=(b < BLOCKS)[:, None], other=0.0)
                x_BJ = _as(x_BJ, tl.float16).to(tl.float32)
                acc_BN += tl.sum(q_BNJ * x_BJ[:, None, :], 2) * d_BN
            else:
                w_BNJ = rounded(q_BNJ * d_BN[:, :, None], tl.float16)
                w_NK = tl.reshape(tl.permute(w_BNJ, (1, 0, 2)), (rows, BLOCK_B * BYTES))
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
        acc_NT = tl.sum(acc_BN, 0)[:, None]
    return acc_NT


@triton.jit
def _one_plus(word, PLACE: tl.constexpr):
    """1 + q / 16 of the code at a place of every word, float32."""
    if 4 * PLACE < 19:
        shifted = word << (19 - 4 * PLACE)
    else:
        shifted = word >> (4 * PLACE - 19)
    return ((shifted & 0x780000) | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def _nibbles(code, scale, n_rows, row_N, ok_N, x, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """q4_0 and one token, from words of eight codes in three instructions a weight.

    A code q that is shifted into the top of the mantissa of 1.0 reads 1 + q / 16, so a block's
    product, the sum of d (q - 8) x, is 16 d (sum of (1 + q / 16) x - 1.5 sum of x).
    """
    BLOCKS: tl.constexpr = K // 32
    BLOCK_B: tl.constexpr = BLOCK_K // 32
    acc_BN = tl.zeros((BLOCK_B, row_N.shape[0]), tl.float32)
    m = tl.arange(0, 4)
    for start in range(0, BLOCKS, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        ok_BN = (b < BLOCKS)[:, None] & ok_N[None, :]
        place_BN = b[:, None] * n_rows + row_N[None, :]
        d_BN = tl.load(scale + place_BN, mask=ok_BN, other=0.0).to(tl.float32)
        word_BNM = tl.load(
            code + place_BN[:, :, None] * 4 + m[None, None, :], mask=ok_BN[:, :, None], other=0
        )
        sum_BNM = tl.zeros((BLOCK_B, row_N.shape[0], 4), tl.float32)
        x_sum_BM = tl.zeros((BLOCK_B, 4), tl.float32)
        for half in tl.static_range(2):
            # Byte j of a block holds its codes j and j + 16; x_i goes with byte i of every word.
            k_BJ = b[:, None] * 32 + half * 16 + tl.arange(0, 16)[None, :]
            x_BJ = tl.load(x + k_BJ, mask=(b < BLOCKS)[:, None], other=0.0)
            even, odd = tl.split(tl.reshape(_as(x_BJ, tl.float16), (BLOCK_B, 4, 2, 2)))
            x_0, x_2 = tl.split(even)
            x_1, x_3 = tl.split(odd)
            x_sum_BM += x_0.to(tl.float32) + x_1.to(tl.float32)
            x_sum_BM += x_2.to(tl.float32) + x_3.to(tl.float32)
            sum_BNM += _one_plus(word_BNM, half) * x_0.to(tl.float32)[:, None, :]
            sum_BNM += _one_plus(word_BNM, half + 2) * x_1.to(tl.float32)[:, None, :]
            sum_BNM += _one_plus(word_BNM, half + 4) * x_2.to(tl.float32)[:, None, :]
            sum_BNM += _one_plus(word_BNM, half + 6) * x_3.to(tl.float32)[:, None, :]
        acc_BN += 16 * d_BN * (tl.sum(sum_BNM, 2) - 1.5 * tl.sum(x_sum_BM, 1)[:, None])
    return tl.sum(acc_BN, 0)[:, None]


@triton.jit
def _as(x, dtype: tl.constexpr):
    """A 16-bit or float32 tensor in another type, unless it has it already."""
    if x.dtype == dtype:
        return x
    return rounded(x.to(tl.float32), dtype)
