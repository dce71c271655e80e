"""The down projection over a list of neurons (S3).

    y = sum over k of x1[k] * down[row[k]] + bias

Programs split the hidden size and the list. Each sums its tiles of the list into a partial result,
and the last one to finish a piece of the hidden size adds the partial results in their order, so
the sum is the same in every run. Rows whose x1 is 0 for all tokens are not read.

Shape letters: T tokens, D hidden, F FFN width, K places of a tile of the list, G programs that
share the list, C pieces of D.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsecast.kernels.launch import after_previous, options, padded
from sparsecast.kernels.products import dot, rounded
from sparsecast.kernels.rows import Rows

CONFIGS = {
    1: {"BLOCK_K": 32, "BLOCK_D": 128, "GROUPS": 24, "STAGES": 1, "num_warps": 2},
    16: {"BLOCK_K": 32, "BLOCK_D": 128, "GROUPS": 16, "STAGES": 5, "num_warps": 4},
}
"""By padded tokens. BLOCK_D is at least rows.py's LEAST_PIECE."""


def reference(rows: Rows, down_FD: Tensor, bias_D: Tensor | None) -> Tensor:
    """What the kernel must equal, (T, D) float64."""
    total = int(rows.total)
    y_TD = rows.x1_FT[:total].double().T @ down_FD[rows.row_F[:total].long()].double()
    return y_TD if bias_D is None else y_TD + bias_D.double()


@triton.jit
def _entries(row, x1, k_K, F, tokens, t):
    """Neurons and x1 at places of the list. What lies behind its end is nonsense: one token reads
    on before that end is known."""
    n_K = tl.load(row + k_K, mask=k_K < F, other=0)
    x1_TK = tl.load(
        x1 + k_K[None, :] * tokens + t[:, None],
        mask=(k_K < F)[None, :] & (t < tokens)[:, None],
        other=0.0,
    )
    return n_K, x1_TK


@triton.jit
def _rows(down, n_K, x1_TK, ok_K, d, D: tl.constexpr):
    """The weights of a tile, and its x1 with zeros behind the list's end."""
    x1_TK = tl.where(ok_K[None, :], x1_TK, 0.0)
    read_K = tl.max((x1_TK != 0).to(tl.int32), 0) > 0
    w_KD = tl.load(
        down + n_K.to(tl.int64)[:, None] * D + d[None, :],
        mask=read_K[:, None] & (d < D)[None, :],
        other=0.0,
    )
    return w_KD, x1_TK


@triton.jit
def _summed(acc_SD, w_KD, x1_TK):
    """One token: rows that share a thread are added in it."""
    term_KD = tl.trans(x1_TK).to(tl.float32) * w_KD.to(tl.float32)
    S: tl.constexpr = acc_SD.shape[0]
    K: tl.constexpr = w_KD.shape[0]
    return acc_SD + tl.sum(tl.reshape(term_KD, (K // S, S, w_KD.shape[1])), 0)


@triton.jit(do_not_specialize=["tokens"])
def _kernel(
    row,
    x1,
    count,
    ticket,
    down,
    bias,
    part,
    y,
    tokens,
    F,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GROUPS: tl.constexpr,
    T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    after_previous(PDL)
    group = tl.program_id(1)
    t = tl.arange(0, T)
    k = group * BLOCK_K + tl.arange(0, BLOCK_K)
    n_K, x1_TK = _entries(row, x1, k, F, tokens, t)
    total = tl.load(count)
    groups = tl.minimum(tl.maximum(tl.cdiv(total, BLOCK_K), 1), GROUPS)
    if group >= groups:
        return
    dtype: tl.constexpr = down.dtype.element_ty
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    if T == 1:
        acc_SD = tl.zeros((16, BLOCK_D), tl.float32)
        for _ in range(group * BLOCK_K, total, groups * BLOCK_K):
            w_KD, x1_TK = _rows(down, n_K, x1_TK, k < total, d, D)
            k += groups * BLOCK_K
            n_K, next_TK = _entries(row, x1, k, F, tokens, t)
            acc_SD = _summed(acc_SD, w_KD, x1_TK)
            x1_TK = next_TK
        acc_TD = tl.sum(acc_SD, 0)[None, :]
    else:
        acc_TD = tl.zeros((T, BLOCK_D), tl.float32)
        for start in tl.range(group * BLOCK_K, total, groups * BLOCK_K, num_stages=STAGES):
            k = start + tl.arange(0, BLOCK_K)
            n_K, x1_TK = _entries(row, x1, k, F, tokens, t)
            w_KD, x1_TK = _rows(down, n_K, x1_TK, k < total, d, D)
            acc_TD = dot(x1_TK, w_KD, acc_TD)
    ok_TD = (t < tokens)[:, None] & (d < D)[None, :]
    tl.store(part + (group * tokens + t)[:, None] * D + d[None, :], acc_TD, mask=ok_TD)
    tl.debug_barrier()  # all of the part is written before the ticket says so
    if tl.atomic_add(ticket + tl.program_id(0), 1, sem="acq_rel") == groups - 1:
        tl.store(ticket + tl.program_id(0), 0)
        y_TD = tl.zeros((T, BLOCK_D), tl.float32)
        for g in tl.static_range(GROUPS):
            y_TD += tl.load(
                part + (g * tokens + t)[:, None] * D + d[None, :],
                mask=ok_TD & (g < groups),
                other=0.0,
                cache_modifier=".cg",
            )
        if HAS_BIAS:
            y_TD += tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        tl.store(y + t[:, None] * D + d[None, :], rounded(y_TD, dtype), mask=ok_TD)


def down(rows: Rows, down_FD: Tensor, bias_D: Tensor | None) -> Tensor:
    """Run it; y_TD in the weights' dtype. `rows.ticket_C` is zero before and after."""
    d, tokens = down_FD.shape[1], rows.x1_FT.shape[1]
    pad = padded(tokens)
    config = _config(pad, d)
    part_GTD = torch.empty(config["GROUPS"], tokens, d, dtype=torch.float32, device=down_FD.device)
    y_TD = torch.empty(tokens, d, dtype=down_FD.dtype, device=down_FD.device)
    _kernel[(triton.cdiv(d, config["BLOCK_D"]), config["GROUPS"])](
        *rows, down_FD, down_FD if bias_D is None else bias_D, part_GTD, y_TD, tokens, len(down_FD),
        D=d, HAS_BIAS=bias_D is not None, T=pad, **config, **options(down_FD),
    )  # fmt: skip
    return y_TD


def _config(pad: int, d: int) -> dict[str, int]:
    """More than about a thousand programs only cost time."""
    config = CONFIGS[pad]
    pieces = triton.cdiv(d, config["BLOCK_D"])
    return config | {"GROUPS": max(1, min(config["GROUPS"], 1024 // pieces))}
