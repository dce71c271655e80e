"""The down projection over a list of selected neurons.

    y = sum over k of x1[k] * down[row[k]] + bias

or, with an RMS norm of weights w between x1 and down (BitNet's BitNetRMSNorm in transformers),

    y = s * sum over k of x1[k] * w[row[k]] * down[row[k]] + bias
    s = 1 / sqrt(sum over k of x1[k]^2 / F + eps)

where neurons that are not listed add nothing to either sum. Sums of squares are float32; each
program adds those of its part of the list, and s is applied where the partial sums are added. The
dense model rounds s * x1 and then its product with w; here several tokens round x1 * w alone, and
one token rounds neither. So in float16 several tokens need |x1 * w| <= 65504.

Programs split the hidden size into blocks and share the list. Rows whose x1 is 0 for all tokens are
not read. Each program stores a partial sum of its block; the last program to finish the block adds
the partial sums in a fixed order, so every run gives the same bits.

Several tokens go through the tensor cores, a tile of the list at a time. One token is summed in
registers while the list is still being written: its programs have one warp each, so that many fit
on the GPU beside the kernel that writes the list. They start once every program of that kernel has
started, wait for list entries instead of for its end (active_list.py), and request the next tile's
entries while the rows of this tile are loading.

Shape letters: T tokens, D hidden, F FFN width, K entries of a tile of the list, G programs that
share the list, C blocks of the hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecast.kernels.ops.active_list import (
    TILE,
    ActiveList,
    EntryList,
    read_tile,
    read_total,
    unpacked,
)
from sparsecast.kernels.ops.compiler import tl, triton
from sparsecast.kernels.ops.dot import dot, rounded
from sparsecast.kernels.ops.launch import after_previous, launch_options, padded_tokens

CONFIG = {"BLOCK_K": 32, "BLOCK_D": 128, "GROUPS": 16, "STAGES": 5, "num_warps": 4}
"""Block sizes for several tokens. GROUPS is the maximum number of programs that share the list."""
ONE_TOKEN_GROUPS = 24
"""The same maximum for one token."""
MAX_PROGRAMS = 1024
"""More programs made one token slower. This was not measured for several tokens."""
_TILE = tl.constexpr(TILE)


def reference(
    active: ActiveList,
    down_FD: Tensor,
    bias_D: Tensor | None,
    norm_F: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Compute what the kernels must return, (T, D) float64."""
    row_K, x1_KT = unpacked(active)
    x1_TK = x1_KT.double().T
    if norm_F is not None:
        mean_T = x1_TK.square().sum(1) / len(norm_F)
        x1_TK = x1_TK * (mean_T + eps).rsqrt()[:, None] * norm_F[row_K.long()].double()
    y_TD = x1_TK @ down_FD[row_K.long()].double()
    return y_TD if bias_D is None else y_TD + bias_D.double()


@triton.jit(do_not_specialize=["tokens"])
def _batch_kernel(
    row,
    x1,
    count,
    ticket,
    down,
    bias,
    norm,
    part,
    squares,
    y,
    tokens,
    F: tl.constexpr,
    EPS: tl.constexpr,
    D: tl.constexpr,
    GROUPS: tl.constexpr,
    T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Several tokens."""
    after_previous(PDL)
    group = tl.program_id(1)
    total = tl.load(count)
    sharing = tl.minimum(tl.maximum(tl.cdiv(total, BLOCK_K), 1), GROUPS)
    if group >= sharing:
        return
    t = tl.arange(0, T)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc_TD = tl.zeros((T, BLOCK_D), tl.float32)
    square_TK = None
    if norm is not None:
        square_TK = tl.zeros((T, BLOCK_K), tl.float32)
    for start in tl.range(group * BLOCK_K, total, sharing * BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)
        n_K = tl.load(row + k, mask=k < total, other=0)
        x1_TK = tl.load(
            x1 + k[None, :] * tokens + t[:, None],
            mask=(k < total)[None, :] & (t < tokens)[:, None],
            other=0.0,
        )
        read_K = tl.max((x1_TK != 0).to(tl.int32), 0) > 0
        w_KD = tl.load(
            down + n_K.to(tl.int64)[:, None] * D + d[None, :],
            mask=read_K[:, None] & (d < D)[None, :],
            other=0.0,
        )
        if norm is not None:
            norm_K = tl.load(norm + n_K, mask=k < total, other=0.0).to(tl.float32)
            value_TK = x1_TK.to(tl.float32)
            square_TK += value_TK * value_TK
            x1_TK = rounded(value_TK * norm_K[None, :], x1_TK.dtype)
        acc_TD = dot(x1_TK, w_KD, acc_TD)
    _add_up(
        acc_TD, square_TK, part, squares, ticket, bias, y, group, sharing, t, tokens, d, F, EPS, D,
        GROUPS,
    )  # fmt: skip


@triton.jit
def _one_token_kernel(
    entry,
    ticket,
    down,
    bias,
    norm,
    part,
    squares,
    y,
    F,
    EPS: tl.constexpr,
    D: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    group = tl.program_id(1)
    total = read_total(entry, F)
    sharing = tl.minimum(tl.maximum(tl.cdiv(total, _TILE), 1), GROUPS)
    if group >= sharing:
        return
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc_KD = tl.zeros((_TILE, BLOCK_D), tl.float32)
    square_TK = None
    if norm is not None:
        square_TK = tl.zeros((1, _TILE), tl.float32)
    n_K, x1_K = read_tile(entry, group * _TILE, total)
    for first in range(group * _TILE, total, sharing * _TILE):
        w_KD = tl.load(
            down + n_K[:, None] * D + d[None, :],
            mask=(x1_K != 0)[:, None] & (d < D)[None, :],
            other=0.0,
        )
        if norm is not None:
            norm_K = tl.load(norm + n_K, mask=x1_K != 0, other=0.0).to(tl.float32)
        n_K, next_K = read_tile(entry, first + sharing * _TILE, total)
        if norm is not None:
            square_TK += (x1_K * x1_K)[None, :]
            x1_K *= norm_K
        acc_KD += x1_K[:, None] * w_KD.to(tl.float32)
        x1_K = next_K
    after_previous(PDL)
    acc_TD = tl.sum(acc_KD, 0)[None, :]
    t = tl.arange(0, 1)
    _add_up(
        acc_TD, square_TK, part, squares, ticket, bias, y, group, sharing, t, 1, d, F, EPS, D,
        GROUPS,
    )  # fmt: skip


@triton.jit
def _add_up(
    acc_TD,
    square_TK,
    part,
    squares,
    ticket,
    bias,
    y,
    group,
    sharing,
    t,
    tokens,
    d,
    F,
    EPS: tl.constexpr,
    D: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Store this program's partial sum (float32) of columns d, and that of its squares of x1 if
    there is a norm. The last of the `sharing` programs, by the ticket of the block, adds the
    partial sums and the bias, writes y and resets the ticket to 0."""
    ok_TD = (t < tokens)[:, None] & (d < D)[None, :]
    tl.store(part + (group * tokens + t)[:, None] * D + d[None, :], acc_TD, mask=ok_TD)
    if square_TK is not None:
        square_T = tl.sum(square_TK, 1)
        squares += tl.program_id(0) * GROUPS * tokens  # this block's
        tl.store(squares + group * tokens + t, square_T, mask=t < tokens)
    tl.debug_barrier()  # the whole partial sum is stored before the ticket is taken
    if tl.atomic_add(ticket + tl.program_id(0), 1, sem="acq_rel") == sharing - 1:
        tl.store(ticket + tl.program_id(0), 0)
        y_TD = tl.zeros(acc_TD.shape, tl.float32)
        for g in tl.static_range(GROUPS):
            y_TD += tl.load(
                part + (g * tokens + t)[:, None] * D + d[None, :],
                mask=ok_TD & (g < sharing),
                other=0.0,
                cache_modifier=".cg",
            )
        if square_TK is not None:
            sum_T = tl.zeros(square_T.shape, tl.float32)
            for g in tl.static_range(GROUPS):
                sum_T += tl.load(
                    squares + g * tokens + t,
                    mask=(t < tokens) & (g < sharing),
                    other=0.0,
                    cache_modifier=".cg",
                )
            y_TD *= tl.rsqrt(sum_T / F + EPS)[:, None]
        if bias is not None:
            y_TD += tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        tl.store(y + t[:, None] * D + d[None, :], rounded(y_TD, y.dtype.element_ty), mask=ok_TD)


def down(
    active: ActiveList,
    down_FD: Tensor,
    bias_D: Tensor | None,
    norm_F: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Launch the kernel; return y_TD in the weights' dtype. `active.ticket_C` is zero before and
    after. `norm_F` is the weight of an RMS norm in front, `eps` its epsilon.

    The list of one token may still be incomplete at the launch. The weights must be written before
    the selecting kernel launches.
    """
    f, d = down_FD.shape
    if isinstance(active, EntryList):
        tokens, config = 1, _one_token_config(d)
    else:
        tokens, config = active.x1_FT.shape[1], _config(d)
    part_GTD = torch.empty(config["GROUPS"], tokens, d, dtype=torch.float32, device=down_FD.device)
    y_TD = torch.empty(tokens, d, dtype=down_FD.dtype, device=down_FD.device)
    grid = (triton.cdiv(d, config["BLOCK_D"]), config["GROUPS"])
    squares_CGT: Tensor | None = None
    if norm_F is not None:
        squares_CGT = torch.empty(*grid, tokens, dtype=torch.float32, device=down_FD.device)
    tensors = (down_FD, bias_D, norm_F, part_GTD, squares_CGT, y_TD)
    common = {"EPS": None if norm_F is None else eps, "D": d, **config, **launch_options(down_FD)}
    if isinstance(active, EntryList):
        _one_token_kernel[grid](active.entry_E, active.ticket_C, *tensors, f, **common)
    else:
        width = None if norm_F is None else f
        _batch_kernel[grid](*active, *tensors, tokens, F=width, T=padded_tokens(tokens), **common)
    return y_TD


def _config(d: int) -> dict[str, int]:
    return CONFIG | {"GROUPS": _groups(CONFIG["GROUPS"], triton.cdiv(d, CONFIG["BLOCK_D"]))}


def _one_token_config(d: int) -> dict[str, int]:
    """Block sizes by hidden size. BLOCK_D is at least gate_up.py's MIN_DOWN_BLOCK."""
    block = 64 if d <= 2048 else 128
    groups = _groups(ONE_TOKEN_GROUPS, triton.cdiv(d, block))
    return {"BLOCK_D": block, "GROUPS": groups, "num_warps": 1}


def _groups(most: int, blocks: int) -> int:
    """Return how many programs share the list, at most `most`."""
    return max(1, min(most, MAX_PROGRAMS // blocks))
