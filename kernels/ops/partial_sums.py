"""A sum over programs, the same in every run: whoever finishes last adds the parts in their order.

Shape letters: T tokens, D hidden, G programs that share a sum.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparsecast.kernels.ops.dot import rounded

MOST_PROGRAMS = 1024
"""More than about a thousand only cost time, with one token; several were not measured there."""


def sharers(most: int, pieces: int) -> int:
    """How many programs share the sum of a piece of the hidden size, at most `most`."""
    return max(1, min(most, MOST_PROGRAMS // pieces))


@triton.jit
def add_up(
    acc_TD,
    part,
    ticket,
    bias,
    y,
    group,
    sharing,
    t,
    tokens,
    d,
    D: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Leave this program's part (float32) of columns d; the last of `sharing` programs, by the
    ticket of its piece, adds them and the bias and writes y, and sets the ticket to 0."""
    ok_TD = (t < tokens)[:, None] & (d < D)[None, :]
    tl.store(part + (group * tokens + t)[:, None] * D + d[None, :], acc_TD, mask=ok_TD)
    tl.debug_barrier()  # all of the part is written before the ticket says so
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
        if bias is not None:
            y_TD += tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        tl.store(y + t[:, None] * D + d[None, :], rounded(y_TD, y.dtype.element_ty), mask=ok_TD)
