"""The inputs of the down projection, for the neurons of a set alone (S2, and the cascade).

    exact       x1 = act * (up . x), act as the dense gate left it
    predicted   x1 = act * (up . x), act from the gate's rows of the set; up is read where it fired
    no gate     x1 = act

SLOTS programs share the neurons of a word, each takes BLOCK_N at a time; rows of weights are read
once for all tokens. What leaves is a list in the order of the neurons: their numbers, x1 per token
(0 where that token's neuron did not fire), and how many there are; of one token as
active_list.py has it. Bytes: the gate's rows of the set where it is computed here, and up's rows
that fired for any token.

Shape letters: T tokens, D hidden, F FFN width, N neurons of a tile, W words of 16 neurons.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsecast.kernels.ops import active_list
from sparsecast.kernels.ops.active_list import Selected, put, put_total
from sparsecast.kernels.ops.bitmask import kth_ones, ones, words_before
from sparsecast.kernels.ops.dot import products, rounded
from sparsecast.kernels.ops.gate import fired, fires
from sparsecast.kernels.ops.launch import after_previous, options, padded, start_next

SEVERAL = {"SLOTS": 1, "BLOCK_N": 16, "BLOCK_D": 128, "STAGES": 4, "num_warps": 2}
"""Of several tokens; those below are of one."""
CASCADE = {"SLOTS": 4, "BLOCK_N": 1, "BLOCK_D": 2048, "STAGES": 1, "num_warps": 4}
UP = {"SLOTS": 3, "BLOCK_N": 1, "BLOCK_D": 1024, "STAGES": 1, "num_warps": 4}
WITHOUT_UP = {"SLOTS": 2, "BLOCK_N": 2, "BLOCK_D": 2048, "STAGES": 1, "num_warps": 4}
"""Nothing to compute: act becomes a list."""
LEAST_PIECE = 64
"""Of the hidden size, as `down` cuts it; every piece has a ticket, which is set to zero here."""


class Rows(NamedTuple):
    """Several tokens' list of neurons on the device."""

    row_F: Tensor
    """int32, the first `total` entries are neurons in rising order."""
    x1_FT: Tensor
    """The down projection's inputs of these neurons, in x's dtype."""
    total: Tensor
    """() int32."""
    ticket_C: Tensor
    """int32 zeros: what `down` counts its programs with."""


class Entries(NamedTuple):
    """One token's list."""

    entry_E: Tensor
    """int64, see active_list.py."""
    total: Tensor
    ticket_C: Tensor
    """Both as in `Rows`."""


class FromGate(NamedTuple):
    """act of all neurons, from `gate`."""

    act_FT: Tensor


class FromRows(NamedTuple):
    """act is computed here, for the neurons of a prediction."""

    first_FD: Tensor
    bias_F: Tensor | None
    threshold: float
    chosen_F: Tensor


def listed(rows: Rows | Entries) -> tuple[Tensor, Tensor]:
    """A list's neurons (K,) and their x1 (K, T), once it is complete."""
    if isinstance(rows, Entries):
        row_K, x1_K = active_list.listed(rows.entry_E)
        return row_K, x1_K[:, None]
    total = int(rows.total)
    return rows.row_F[:total], rows.x1_FT[:total]


def reference(
    x_TD: Tensor, on_F: Tensor, source: FromGate | FromRows, up_FD: Tensor | None, relu_up: bool
) -> tuple[Tensor, Tensor]:
    """The numbers of the set's neurons and their x1 in float64, (K,) and (K, T)."""
    row_K = on_F.nonzero().squeeze(1)
    if isinstance(source, FromGate):
        act_KT = source.act_FT[row_K].double()
    else:
        gate_KT = source.first_FD[row_K].double() @ x_TD.double().T
        if source.bias_F is not None:
            gate_KT = gate_KT + source.bias_F[row_K].double()[:, None]
        gate_KT = gate_KT.to(x_TD.dtype).double()
        token = torch.arange(len(x_TD), device=x_TD.device)
        chosen_KT = (source.chosen_F[row_K, None] >> token) & 1 == 1
        silent_KT = (gate_KT < source.threshold) | (gate_KT <= 0) | ~chosen_KT
        act_KT = torch.where(silent_KT, 0, gate_KT)
    if up_FD is None:
        return row_K, act_KT
    up_KT = up_FD[row_K].double() @ x_TD.double().T
    return row_K, act_KT * (up_KT.relu() if relu_up else up_KT)


@triton.jit(do_not_specialize=["tokens"])
def _kernel(
    x,
    mask,
    act,
    first,
    bias,
    chosen,
    up,
    row,
    x1,
    entry,
    count,
    ticket,
    threshold,
    tokens,
    F,
    D: tl.constexpr,
    RELU_UP: tl.constexpr,
    WORDS: tl.constexpr,
    TICKETS: tl.constexpr,
    T: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    if T > 1:
        start_next(PDL)
    after_previous(PDL)
    if T == 1:
        start_next(PDL)  # the list is blank by now
    w = tl.program_id(1)
    word = tl.load(mask + w).to(tl.int32) & 0xFFFF
    before_W = words_before(mask, w, WORDS)
    here = ones(word)
    if (w == 0) & (tl.program_id(0) == 0):
        total = tl.sum(ones(words_before(mask, tl.num_programs(1), WORDS)), 0)
        tl.store(count, total)
        if T == 1:
            put_total(entry, F, total)
        tl.store(ticket + tl.arange(0, TICKETS), tl.zeros((TICKETS,), tl.int32))
    dtype: tl.constexpr = x.dtype.element_ty
    t = tl.arange(0, T)
    for first_i in tl.range(tl.program_id(0) * BLOCK_N, here, SLOTS * BLOCK_N, num_stages=1):
        i = first_i + tl.arange(0, BLOCK_N)
        in_N = i < here
        n = w * 16 + kth_ones(word, i)
        ok_NT = in_N[:, None] & (t < tokens)[None, :]
        if act is None:
            act_NT = _gate(
                first, bias, chosen, n, in_N, x, t, threshold, tokens, D, BLOCK_D, STAGES, T
            )
        else:
            act_NT = tl.load(act + n[:, None] * tokens + t[None, :], mask=ok_NT, other=0.0)
            act_NT = act_NT.to(tl.float32)
        if up is not None:
            # All neurons of the dense gate's set fire, so up need not wait for act.
            fires_N = in_N & fires(act_NT) if act is None else in_N
            up_NT = products(up, n, fires_N, x, tokens, D, BLOCK_D, STAGES, T)
            if RELU_UP:
                up_NT = tl.maximum(up_NT, 0.0)
            act_NT = act_NT * up_NT
        k = tl.sum(ones(before_W), 0) + i  # here, so that weights need not wait for this sum
        x1_NT = rounded(act_NT, dtype)
        if T == 1:
            put(entry, k, n, tl.sum(x1_NT.to(tl.float32), 1), in_N)
        else:
            tl.store(row + k, n, mask=in_N)
            tl.store(x1 + k[:, None] * tokens + t[None, :], x1_NT, mask=ok_NT)


@triton.jit
def _gate(
    first,
    bias,
    chosen,
    n,
    in_N,
    x,
    t,
    threshold,
    tokens,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    T: tl.constexpr,
):
    """(N, T) float32: the activation of neurons n for the tokens that chose them."""
    gate_NT = products(first, n, in_N, x, tokens, D, BLOCK_D, STAGES, T)
    if bias is not None:
        gate_NT += tl.load(bias + n, mask=in_N, other=0.0).to(tl.float32)[:, None]
    act_NT = fired(gate_NT, threshold, x.dtype.element_ty)
    if T > 1:
        chosen_N = tl.load(chosen + n, mask=in_N, other=0)
        act_NT = tl.where((chosen_N[:, None] >> t[None, :]) & 1 == 1, act_NT, 0.0)
    return act_NT


def rows(
    x_TD: Tensor,
    selected: Selected,
    source: FromGate | FromRows,
    up_FD: Tensor | None,
    *,
    relu_up: bool,
) -> Rows | Entries:
    """Run it over the selected neurons; `up_FD` is None where there is no gate.

    One token's `selected.blank_E` becomes the list: each selection is good for one call.
    """
    tokens, d = x_TD.shape
    mask_W, blank_E = selected
    pad = padded(tokens)
    device = x_TD.device
    tickets = triton.next_power_of_2(triton.cdiv(d, LEAST_PIECE))
    if isinstance(source, FromGate):
        act, first, bias, chosen, threshold = source.act_FT, None, None, None, 0.0
        width = len(source.act_FT)
    else:
        first, bias, threshold, chosen = source
        act, width = None, len(source.first_FD)
    total = torch.empty((), dtype=torch.int32, device=device)
    ticket_C = torch.empty(tickets, dtype=torch.int32, device=device)
    assert (blank_E is None) == (tokens > 1), f"a selection of other tokens than these {tokens}"
    row_F: Tensor | None = None
    x1_FT: Tensor | None = None
    out: Rows | Entries
    if blank_E is None:
        row_F = torch.empty(width, dtype=torch.int32, device=device)
        x1_FT = torch.empty(width, tokens, dtype=x_TD.dtype, device=device)
        out = Rows(row_F, x1_FT, total, ticket_C)
    else:
        out = Entries(blank_E, total, ticket_C)
    config = _config(tokens, act is None, up_FD is not None, d)
    _kernel[(config["SLOTS"], len(mask_W))](
        x_TD, mask_W, act, first, bias, chosen, up_FD, row_F, x1_FT, blank_E, total, ticket_C,
        threshold, tokens, width, D=d, RELU_UP=relu_up,
        WORDS=triton.next_power_of_2(len(mask_W)), TICKETS=tickets, T=pad,
        **config, **options(x_TD),
    )  # fmt: skip
    return out


def _config(tokens: int, computes_gate: bool, has_up: bool, d: int) -> dict[str, int]:
    """Where act is computed here, up follows gate row by row, so more programs keep the memory busy
    meanwhile. Tiles are what was fastest at hidden sizes of 512 to 8192."""
    if tokens > 1:
        return SEVERAL
    if not computes_gate:
        return UP | {"BLOCK_D": 1024 if d < 8192 else 2048} if has_up else WITHOUT_UP
    if d <= 2048:
        return CASCADE | {"SLOTS": 8, "BLOCK_D": 512, "num_warps": 2}
    return CASCADE | {"BLOCK_D": 1024} if d % 4096 == 0 else CASCADE
