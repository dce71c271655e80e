"""The list of selected neurons, which `gate_up` writes and `down` reads.

Several tokens have a `BatchList`, which is complete when `down` starts.

One token has an `EntryList`, which `down` reads while it is being written. An entry is one int64:
the neuron's index in the high half, x1 in float32 in the low half. The last place holds the number
of entries. -1 means not written yet: the selecting kernel blanks the list, `gate_up` fills it in
whatever order its programs run, and `down` waits for the entries that it needs next.

Memory order: an entry is written and read as a whole, and no other data depends on seeing it. So
relaxed accesses at GPU scope, which go through the L2, are enough, without release, acquire or
fences. Once a poll has seen the entry, a plain load that bypasses the L1 reads it, because the
entry is in the L2 by then. (A relaxed or volatile load would state this to the memory model too,
but costs 0.5 us or more.)

A waiting program occupies the GPU, so the programs it waits for must already be resident. CUDA
launches `down` early only after every program of `gate_up` has called `start_next`, which it does
after its own wait. So by then the list is blank in the L2, where `down` looks, and the programs of
`gate_up` wait for nothing else.

Shape letters: T tokens, F FFN width, W words of 16 neurons, N neurons of a tile, K entries, E = F +
1 places of the list, C blocks of the hidden size in `down`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsecast.kernels.ops.compiler import tl, triton
from sparsecast.kernels.ops.launch import INTERPRETED

TILE = 32
"""Entries that a program waits for at once, one per thread of a warp."""
_TILE = tl.constexpr(TILE)
_INTERPRETED = tl.constexpr(INTERPRETED)


class Selection(NamedTuple):
    """The neurons to compute."""

    mask_W: Tensor
    """int16, see bitmask.py."""
    blank_E: Tensor | None
    """int64, all -1: memory for the `EntryList` of one call of `gate_up`. None for several
    tokens."""


class BatchList(NamedTuple):
    """The list of several tokens, on the device."""

    row_F: Tensor
    """int32; the first `total` elements are neuron indices in rising order."""
    x1_FT: Tensor
    """Inputs of the down projection for these neurons, in x's dtype."""
    total: Tensor
    """() int32."""
    ticket_C: Tensor
    """int32 zeros, with which `down` counts the programs that have finished."""


class EntryList(NamedTuple):
    """The list of one token, on the device."""

    entry_E: Tensor
    """int64, as above."""
    total: Tensor
    """() int32."""
    ticket_C: Tensor
    """As in `BatchList`."""


ActiveList = BatchList | EntryList


def unpacked(active: ActiveList) -> tuple[Tensor, Tensor]:
    """Return the neurons of a complete list, int32 (K,), and their x1 (K, T)."""
    if isinstance(active, EntryList):
        entry_K = active.entry_E[: int(active.entry_E[-1])]
        bits_K, row_K = entry_K.view(torch.int32).view(-1, 2).unbind(1)
        return row_K, bits_K.contiguous().view(torch.float32)[:, None]
    total = int(active.total)
    return active.row_F[:total], active.x1_FT[:total]


def allocate_entries(width: int, tokens: int, device: torch.device) -> Tensor | None:
    """Allocate the list that a selecting kernel must blank; None for several tokens."""
    return torch.empty(width + 1, dtype=torch.int64, device=device) if tokens == 1 else None


@triton.jit
def blank(entry, f_N, F):
    """Blank the entries `f_N`, and in the first program the number of entries."""
    tl.store(entry + f_N, tl.full(f_N.shape, -1, tl.int64), mask=f_N < F)
    if tl.program_id(0) == 0:
        tl.store(entry + F, tl.full((), -1, tl.int64))


@triton.jit
def write_entries(entry, k_N, n_N, x1_N, in_N):
    """Write neurons n_N and their x1_N (float32) at k_N."""
    bits_N = x1_N.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    tl.atomic_xchg(entry + k_N, (n_N.to(tl.int64) << 32) | bits_N, mask=in_N, sem="relaxed")


@triton.jit
def write_total(entry, F, total):
    """Write the number of entries."""
    tl.atomic_xchg(entry + F, total.to(tl.int64), sem="relaxed")


@triton.jit
def read_total(entry, F):
    """Wait for the number of entries and return it, int32."""
    return tl.load(entry + F + _wait_until_written(entry + F, 0), cache_modifier=".cg").to(tl.int32)


@triton.jit
def read_tile(entry, first, total):
    """Wait for `TILE` entries from `first` on and return neurons (int64) and x1 (float32); x1 is 0
    behind the end of the list."""
    k_K = first + tl.arange(0, _TILE)
    offset = 0
    if first < total:
        offset = _wait_until_written(entry + first, tl.minimum(total - first, _TILE) - 1)
    entry_K = tl.load(entry + offset + k_K, mask=k_K < total, other=0, cache_modifier=".cg")
    return entry_K >> 32, entry_K.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _wait_until_written(entry, last):
    """Wait until none of the entries 0 to last (at most 31) is blank, then return 0.

    Each thread of a warp polls one entry. The 0 is computed from the polled value, so the compiler
    cannot move a load whose address contains it in front of the loop.
    """
    if _INTERPRETED:  # programs run one after the other
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
