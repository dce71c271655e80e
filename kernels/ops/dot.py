"""Products of 16-bit weight rows with 1 to 16 tokens, inside a kernel.

One token is summed in registers; several go through the tensor cores. Tokens are rounded to the
weights' dtype; sums are float32.

Shape letters: N rows of a tile, K columns of a weight, T padded tokens.
"""

from __future__ import annotations

from sparsecast.kernels.ops.compiler import tl, triton
from sparsecast.kernels.ops.launch import INTERPRETED, after_previous

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """Round float32 to a 16-bit dtype, ties to even."""
    if _INTERPRETED and dtype == tl.bfloat16:  # the interpreter truncates
        bits = value.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        value = bits.to(tl.float32, bitcast=True)
    return value.to(dtype)


@triton.jit
def dot(a, b, acc):
    """Return acc + a @ b in float32."""
    if _INTERPRETED:  # it would multiply the bit patterns of bfloat16
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
    """Multiply the rows `row_N` of a 16-bit weight by x (tokens, K); return (N, T) float32.

    Rows that are not ok are not read; 0 stands for their weights. STAGES is the number of tiles of
    BLOCK_K columns in flight; 1, for one token, unrolls the loop. With PDL this waits until x is
    written (launch.py); an unrolled loop requests the first tile before that.
    """
    row_N = row_N.to(tl.int64)
    if T == 1:
        acc = tl.zeros((row_N.shape[0], BLOCK_K), tl.float32)
    else:
        acc = tl.zeros((row_N.shape[0], T), tl.float32)
    if STAGES == 1:
        for start in tl.static_range(0, K, BLOCK_K):
            w_NK = _weight_tile(weight, row_N, ok_N, start, K, BLOCK_K)
            if PDL and start == 0:
                after_previous(PDL)
            acc = _accumulate(acc, w_NK, x, start, K, BLOCK_K)
    else:
        after_previous(PDL)
        for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            w_NK = _weight_tile(weight, row_N, ok_N, start, K, BLOCK_K)
            if T == 1:
                acc = _accumulate(acc, w_NK, x, start, K, BLOCK_K)
            else:
                k = start + tl.arange(0, BLOCK_K)
                acc = dot(w_NK, _input_columns(x, k, tokens, K, T, w_NK.dtype), acc)
    if T == 1:
        acc = tl.sum(acc, 1)[:, None]
    return acc


@triton.jit
def _weight_tile(weight, row_N, ok_N, start, K: tl.constexpr, BLOCK_K: tl.constexpr):
    k = start + tl.arange(0, BLOCK_K)
    return tl.load(
        weight + row_N[:, None] * K + k[None, :], mask=ok_N[:, None] & (k < K)[None, :], other=0.0
    )


@triton.jit
def _accumulate(acc_NK, w_NK, x, start, K: tl.constexpr, BLOCK_K: tl.constexpr):
    k = start + tl.arange(0, BLOCK_K)
    x_K = _converted(tl.load(x + k, mask=k < K, other=0.0), w_NK.dtype)
    return acc_NK + w_NK.to(tl.float32) * x_K.to(tl.float32)[None, :]


@triton.jit
def _input_columns(x, k, tokens, K: tl.constexpr, T: tl.constexpr, dtype: tl.constexpr):
    """Load columns k of all tokens, (K, T), rounded to `dtype`."""
    t = tl.arange(0, T)
    x_KT = tl.load(
        x + t[None, :] * K + k[:, None], mask=(t < tokens)[None, :] & (k < K)[:, None], other=0.0
    )
    return _converted(x_KT, dtype)


@triton.jit
def _converted(x, dtype: tl.constexpr):
    """Convert a 16-bit or float32 tensor to `dtype` unless it has it already."""
    if x.dtype == dtype:
        return x
    return rounded(x.to(tl.float32), dtype)
