"""The down projection of one token, which follows the list's entries while they are written.

Programs of one warp each, so that many fit on the GPU beside the kernel that writes them: they
start when the last of that one's programs have, wait for entries instead of for its end
(entries.py), and ask for the entries of their next tile while this one's rows are on their way.

Shape letters: D hidden, K places of a tile of the list.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparsecast.kernels.ops.active_list import AT_ONCE, tile, total_of
from sparsecast.kernels.ops.launch import after_previous
from sparsecast.kernels.ops.partial_sums import add_up, sharers

GROUPS = 24
"""Programs that share the list, at most."""
_AT_ONCE = tl.constexpr(AT_ONCE)


@triton.jit
def kernel(
    entry,
    ticket,
    down,
    bias,
    part,
    y,
    F,
    D: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    group = tl.program_id(1)
    total = total_of(entry, F)
    sharing = tl.minimum(tl.maximum(tl.cdiv(total, _AT_ONCE), 1), GROUPS)
    if group >= sharing:
        return
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc_KD = tl.zeros((_AT_ONCE, BLOCK_D), tl.float32)
    n_K, x1_K = tile(entry, group * _AT_ONCE, total)
    for first in range(group * _AT_ONCE, total, sharing * _AT_ONCE):
        w_KD = tl.load(
            down + n_K[:, None] * D + d[None, :],
            mask=(x1_K != 0)[:, None] & (d < D)[None, :],
            other=0.0,
        )
        n_K, next_K = tile(entry, first + sharing * _AT_ONCE, total)
        acc_KD += x1_K[:, None] * w_KD.to(tl.float32)
        x1_K = next_K
    after_previous(PDL)
    acc_TD = tl.sum(acc_KD, 0)[None, :]
    t = tl.arange(0, 1)
    add_up(acc_TD, part, ticket, bias, y, group, sharing, t, 1, d, D, GROUPS)


def config(d: int) -> dict[str, int]:
    """Blocks by hidden size; BLOCK_D is at least rows.py's LEAST_PIECE."""
    block = 64 if d <= 2048 else 128
    return {"BLOCK_D": block, "GROUPS": sharers(GROUPS, triton.cdiv(d, block)), "num_warps": 1}
