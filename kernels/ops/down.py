"""The down projection over a list of neurons (S3).

    y = sum over k of x1[k] * down[row[k]] + bias

Programs split the hidden size and the list; each sums its tiles of the list, and the last of a
piece of the hidden size adds what they found (partial_sums.py). Rows whose x1 is 0 for all tokens
are not read. Here are several tokens; one token's kernel is in down_one.py.

Shape letters: T tokens, D hidden, F FFN width, K places of a tile of the list, G programs that
share the list.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsecast.kernels.ops import down_one
from sparsecast.kernels.ops.dot import dot
from sparsecast.kernels.ops.gate_up import Entries, Rows, listed
from sparsecast.kernels.ops.launch import after_previous, options, padded
from sparsecast.kernels.ops.partial_sums import add_up, sharers

CONFIG = {"BLOCK_K": 32, "BLOCK_D": 128, "GROUPS": 16, "STAGES": 5, "num_warps": 4}


def reference(rows: Rows | Entries, down_FD: Tensor, bias_D: Tensor | None) -> Tensor:
    """What the kernel must equal, (T, D) float64."""
    row_K, x1_KT = listed(rows)
    y_TD = x1_KT.double().T @ down_FD[row_K.long()].double()
    return y_TD if bias_D is None else y_TD + bias_D.double()


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
    D: tl.constexpr,
    GROUPS: tl.constexpr,
    T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    after_previous(PDL)
    group = tl.program_id(1)
    total = tl.load(count)
    sharing = tl.minimum(tl.maximum(tl.cdiv(total, BLOCK_K), 1), GROUPS)
    if group >= sharing:
        return
    t = tl.arange(0, T)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc_TD = tl.zeros((T, BLOCK_D), tl.float32)
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
        acc_TD = dot(x1_TK, w_KD, acc_TD)
    add_up(acc_TD, part, ticket, bias, y, group, sharing, t, tokens, d, D, GROUPS)


def down(rows: Rows | Entries, down_FD: Tensor, bias_D: Tensor | None) -> Tensor:
    """Run it; y_TD in the weights' dtype. `rows.ticket_C` is zero before and after.

    One token's list may still be on its way; the weights must be older than who selected it.
    """
    f, d = down_FD.shape
    if isinstance(rows, Entries):
        tokens, config = 1, down_one.config(d)
    else:
        tokens, config = rows.x1_FT.shape[1], _config(d)
    part_GTD = torch.empty(config["GROUPS"], tokens, d, dtype=torch.float32, device=down_FD.device)
    y_TD = torch.empty(tokens, d, dtype=down_FD.dtype, device=down_FD.device)
    grid = (triton.cdiv(d, config["BLOCK_D"]), config["GROUPS"])
    weights = (down_FD, bias_D)
    common = {"D": d, **config, **options(down_FD)}
    if isinstance(rows, Entries):
        down_one.kernel[grid](rows.entry_E, rows.ticket_C, *weights, part_GTD, y_TD, f, **common)
    else:
        _kernel[grid](*rows, *weights, part_GTD, y_TD, tokens, T=padded(tokens), **common)
    return y_TD


def _config(d: int) -> dict[str, int]:
    pieces = triton.cdiv(d, CONFIG["BLOCK_D"])
    return CONFIG | {"GROUPS": sharers(CONFIG["GROUPS"], pieces)}
