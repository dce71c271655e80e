"""Products of weight rows with 1 to 16 tokens, inside a kernel, for every weight format.

One token is a sum of products in registers, and so are up to 4 that meet codes; more go through the
tensor cores. The tokens are rounded to the weights' 16-bit type (float16 beside codes), sums are
float32. Codes come in units of four words (quantised.py).

Shape letters: N rows of a tile, K columns of a weight, U units of a row, W words of a unit, T
tokens as padded.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparsecast.kernels.launch import INTERPRETED, after_previous

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
    row_N,
    ok_N,
    x,
    tokens,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    T: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """(N, T) float32: the rows `row_N` of a 16-bit weight times x (tokens, K).

    Rows that are not ok are not read; their products count for nothing. STAGES is how many tiles of
    BLOCK_K columns are on their way at once; 1, for one token, unrolls the loop. With PDL this
    waits for x to be written (launch.py), after asking for the first tile where it unrolls.
    """
    row_N = row_N.to(tl.int64)
    if T == 1:
        acc = tl.zeros((row_N.shape[0], BLOCK_K), tl.float32)
    else:
        acc = tl.zeros((row_N.shape[0], T), tl.float32)
    if STAGES == 1:
        for start in tl.static_range(0, K, BLOCK_K):
            w_NK = _tile(weight, row_N, ok_N, start, K, BLOCK_K)
            if PDL and start == 0:
                after_previous(PDL)
            acc = _add(acc, w_NK, x, start, K, BLOCK_K)
    else:
        after_previous(PDL)
        for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            w_NK = _tile(weight, row_N, ok_N, start, K, BLOCK_K)
            if T == 1:
                acc = _add(acc, w_NK, x, start, K, BLOCK_K)
            else:
                k = start + tl.arange(0, BLOCK_K)
                acc = dot(w_NK, _columns(x, k, tokens, K, T, w_NK.dtype), acc)
    if T == 1:
        acc = tl.sum(acc, 1)[:, None]
    return acc


@triton.jit
def _tile(weight, row_N, ok_N, start, K: tl.constexpr, BLOCK_K: tl.constexpr):
    k = start + tl.arange(0, BLOCK_K)
    return tl.load(
        weight + row_N[:, None] * K + k[None, :], mask=ok_N[:, None] & (k < K)[None, :], other=0.0
    )


@triton.jit
def _add(acc_NK, w_NK, x, start, K: tl.constexpr, BLOCK_K: tl.constexpr):
    k = start + tl.arange(0, BLOCK_K)
    x_K = _as(tl.load(x + k, mask=k < K, other=0.0), w_NK.dtype)
    return acc_NK + w_NK.to(tl.float32) * x_K.to(tl.float32)[None, :]


@triton.jit
def code_products(
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
    """`products` of a weight in codes of 8 or 4 bits; up to 4 tokens STAGES is 1."""
    row_N = row_N.to(tl.int64)
    UNIT: tl.constexpr = 128 // BITS
    BLOCK_U: tl.constexpr = BLOCK_K // UNIT
    if T <= 4:
        acc = tl.zeros((T, row_N.shape[0], BLOCK_U), tl.float32)
        for start in tl.static_range(0, K // UNIT, BLOCK_U):
            word_NUW, d_NU = _units(code, scale, row_N, ok_N, start, K, UNIT, BLOCK_U)
            if PDL and start == 0:
                after_previous(PDL)
            acc = _add_codes(acc, word_NUW, d_NU, x, tokens, start, K, BITS)
        acc = tl.trans(tl.sum(acc, 2))
    else:
        after_previous(PDL)
        acc = tl.zeros((row_N.shape[0], T), tl.float32)
        for start in tl.range(0, K // UNIT, BLOCK_U, num_stages=STAGES):
            word_NUW, d_NU = _units(code, scale, row_N, ok_N, start, K, UNIT, BLOCK_U)
            acc = _dot_codes(acc, word_NUW, d_NU, x, tokens, start, K, BITS, T)
    return acc


@triton.jit
def _units(
    code, scale, row_N, ok_N, start, K: tl.constexpr, UNIT: tl.constexpr, BLOCK_U: tl.constexpr
):
    """Units of four words, and the scale of each; in q8_0 two of them are a block."""
    u = start + tl.arange(0, BLOCK_U)
    ok_NU = ok_N[:, None] & (u < K // UNIT)[None, :]
    place_NU = (row_N[:, None] * (K // UNIT) + u[None, :]) * 4
    word_NUW = tl.load(
        code + place_NU[:, :, None] + tl.arange(0, 4)[None, None, :],
        mask=ok_NU[:, :, None],
        other=0,
    )
    d_NU = tl.load(
        scale + row_N[:, None] * (K // 32) + (u * UNIT // 32)[None, :], mask=ok_NU, other=0.0
    )
    return word_NUW, d_NU


@triton.jit
def _add_codes(acc_TNU, word_NUW, d_NU, x, tokens, start, K: tl.constexpr, BITS: tl.constexpr):
    """acc + d * (q . x)."""
    UNIT: tl.constexpr = 128 // BITS
    T: tl.constexpr = acc_TNU.shape[0]
    N: tl.constexpr = word_NUW.shape[0]
    U: tl.constexpr = word_NUW.shape[1]
    t = tl.arange(0, T)[:, None, None, None]
    unit = (start + tl.arange(0, U))[None, None, :, None] * UNIT
    part_TNUW = tl.zeros((T, N, U, 4), tl.float32)
    for field in tl.static_range(32 // BITS):
        # Every thread loads what its own words are multiplied by: no exchange between threads.
        k = tl.broadcast_to(unit + 4 * field + tl.arange(0, 4)[None, None, None, :], (T, N, U, 4))
        x_TNUW = _as(tl.load(x + t * K + k, mask=(t < tokens) & (k < K), other=0.0), tl.float16)
        part_TNUW += _codes(word_NUW, field, BITS)[None, :, :, :] * x_TNUW.to(tl.float32)
    return acc_TNU + tl.sum(part_TNUW, 3) * d_NU.to(tl.float32)[None, :, :]


@triton.jit
def _dot_codes(
    acc_NT, word_NUW, d_NU, x, tokens, start, K: tl.constexpr, BITS: tl.constexpr, T: tl.constexpr
):
    """acc + (d q) . x, a field of all units at a time."""
    UNIT: tl.constexpr = 128 // BITS
    UNITS: tl.constexpr = word_NUW.shape[1]
    for field in tl.static_range(32 // BITS):
        w_NUW = _codes(word_NUW, field, BITS) * d_NU.to(tl.float32)[:, :, None]
        i = tl.arange(0, 4 * UNITS)
        k = (start + i // 4) * UNIT + 4 * field + i % 4
        acc_NT = dot(
            tl.reshape(rounded(w_NUW, tl.float16), (w_NUW.shape[0], 4 * UNITS)),
            _columns(x, k, tokens, K, T, tl.float16),
            acc_NT,
        )
    return acc_NT


@triton.jit
def _codes(word, field: tl.constexpr, BITS: tl.constexpr):
    """float32, exact: one code of every word, without its offset of 2^(BITS - 1).

    Bits in the mantissa of 2^e count 2^(e - 23) upwards, so with e = 23 less their place they are
    the code itself, added to 2^e. A field too high for a mantissa is shifted down first.
    """
    HALF: tl.constexpr = 16 if BITS * (field + 1) > 23 else 0
    PLACE: tl.constexpr = BITS * field - HALF
    if HALF:
        word = word >> HALF
    word = (word & ((2**BITS - 1) << PLACE)) | ((127 + 23 - PLACE) << 23)
    return word.to(tl.float32, bitcast=True) - (2 ** (23 - PLACE) + 2 ** (BITS - 1))


@triton.jit
def _columns(x, k, tokens, K: tl.constexpr, T: tl.constexpr, dtype: tl.constexpr):
    """Columns k of all tokens, (K, T), rounded to `dtype`."""
    t = tl.arange(0, T)
    x_KT = tl.load(
        x + t[None, :] * K + k[:, None], mask=(t < tokens)[None, :] & (k < K)[:, None], other=0.0
    )
    return _as(x_KT, dtype)


@triton.jit
def _as(x, dtype: tl.constexpr):
    """A 16-bit or float32 tensor in another type, unless it has it already."""
    if x.dtype == dtype:
        return x
    return rounded(x.to(tl.float32), dtype)
