"""The list of one token's neurons, which the down projection reads while it is being written.

An entry is one int64, the neuron's number above the bits of x1 in float32; the last place holds how
many there are. -1 means not yet: who selects neurons blanks the list, `rows` fills it in whatever
order its programs run, and `down` waits for the entries that it is about to use. An entry is
written whole and read whole, and nothing but itself is concluded from it: so relaxed accesses at
the GPU's scope do, which go through the L2, and no fence is needed. Once a poll has seen that an
entry is there, it is read by a plain load past the L1: what lies in the L2 by then is that entry.
(A relaxed or volatile load would say so to the memory model as well, but takes 0.5 us and more.)

Whoever waits here keeps its place on the GPU, so those it waits for must have theirs already: CUDA
starts `down` early only once every program of `rows` has let it, after its own wait: so the list is
blank by then, in the L2 where `down` looks, and those programs wait for nothing more.

Shape letters: N neurons of a tile, K places of a tile, E places of the list: FFN width + 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsecast.kernels.ops.launch import INTERPRETED

AT_ONCE = 32
"""Places that a program waits for together, one for each thread of a warp."""
_AT_ONCE = tl.constexpr(AT_ONCE)
_INTERPRETED = tl.constexpr(INTERPRETED)


class Selected(NamedTuple):
    """Who is to be computed, and the room for their list."""

    mask_W: Tensor
    blank_E: Tensor | None
    """int64 -1s, which one call of `rows` uses up; None for several tokens."""


def room(width: int, tokens: int, device: torch.device) -> Tensor | None:
    """What a kernel that selects neurons shall blank."""
    return torch.empty(width + 1, dtype=torch.int64, device=device) if tokens == 1 else None


def listed(entry_E: Tensor) -> tuple[Tensor, Tensor]:
    """The neurons of a complete list, int32 (K,), and their x1, float32 (K,)."""
    bits_K, row_K = entry_E[: int(entry_E[-1])].view(torch.int32).view(-1, 2).unbind(1)
    return row_K, bits_K.contiguous().view(torch.float32)


@triton.jit
def blank(entry, f_N, F):
    """Blank the places `f_N`, and the total, which is nobody's, in the first program."""
    tl.store(entry + f_N, tl.full(f_N.shape, -1, tl.int64), mask=f_N < F)
    if tl.program_id(0) == 0:
        tl.store(entry + F, tl.full((), -1, tl.int64))


@triton.jit
def put(entry, k_N, n_N, x1_N, in_N):
    """Write entries, x1 in float32."""
    bits_N = x1_N.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    tl.atomic_xchg(entry + k_N, (n_N.to(tl.int64) << 32) | bits_N, mask=in_N, sem="relaxed")


@triton.jit
def put_total(entry, F, total):
    tl.atomic_xchg(entry + F, total.to(tl.int64), sem="relaxed")


@triton.jit
def total_of(entry, F):
    """How many entries there are, int32, once that is known."""
    return tl.load(entry + F + _there(entry + F, 0), cache_modifier=".cg").to(tl.int32)


@triton.jit
def tile(entry, first, total):
    """Neurons, int64, and x1, float32, at `AT_ONCE` places from the first, once they are there;
    behind the end of the list x1 is 0."""
    k_K = first + tl.arange(0, _AT_ONCE)
    there = 0
    if first < total:
        there = _there(entry + first, tl.minimum(total - first, _AT_ONCE) - 1)
    entry_K = tl.load(entry + there + k_K, mask=k_K < total, other=0, cache_modifier=".cg")
    return entry_K >> 32, entry_K.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _there(entry, last):
    """0, once none of the entries 0 to last (at most 31) is blank.

    Every thread of a warp watches one. What comes back is the sign of what it saw, so that a load
    from an address it was added to cannot be moved to before this loop.
    """
    if _INTERPRETED:  # whose programs run one after the other
        return 0
    return tl.inline_asm_elementwise(
        """
        {
        .reg .pred %blank, %any;
        .reg .u32 %place;
        .reg .u64 %address;
        .reg .b64 %seen;
        .reg .b32 %low, %high;
        mov.u32 %place, %laneid;
        min.u32 %place, %place, $2;
        mad.wide.u32 %address, %place, 8, $1;
        again:
        ld.relaxed.gpu.global.b64 %seen, [%address];
        setp.eq.s64 %blank, %seen, -1;
        vote.sync.any.pred %any, %blank, 0xffffffff;
        @%any bra again;
        bar.warp.sync 0xffffffff;
        mov.b64 {%low, %high}, %seen;
        shr.s32 $0, %high, 31;
        }
        """,
        "=r,l,r",
        [entry.to(tl.int64), last],
        tl.int32,
        is_pure=False,
        pack=1,
    )
