"""The inputs of the down projection for a set of neurons.

    exact       x1 = act * (up . x), act from the dense gate
    predicted   x1 = act * (up . x), act from the set's rows of the gate; up is read where it fired
    no gate     x1 = act

With ReLU² act is squared. act decides what fires and is rounded to x's dtype; the square and its
product with up are float32, and only x1 is rounded again. So in float16 a square that up makes
small enough does not overflow, as it does in the dense model.

SLOTS programs share the neurons of a mask word and compute BLOCK_N of them at a time. A weight row
is read once for all tokens. The result is a list in the order of the neurons (active_list.py): x1
is 0 for a token whose neuron did not fire. Bytes: the gate's rows of the set if they are computed
here, and up's rows that fired for any token.

Shape letters: T tokens, D hidden, F FFN width, N neurons of a tile, W words of 16 neurons, K
neurons of the set, C blocks of the hidden size in `down`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsecast.kernels.ops.active_list import (
    ActiveList,
    BatchList,
    EntryList,
    Selection,
    write_entries,
    write_total,
)
from sparsecast.kernels.ops.bitmask import kth_bit, popcount, words_before
from sparsecast.kernels.ops.compiler import tl, triton
from sparsecast.kernels.ops.dot import products, rounded
from sparsecast.kernels.ops.gate import activated, any_fired
from sparsecast.kernels.ops.launch import (
    after_previous,
    launch_options,
    padded_tokens,
    start_next,
)

SEVERAL_TOKENS = {"SLOTS": 1, "BLOCK_N": 16, "BLOCK_D": 128, "STAGES": 4, "num_warps": 2}
PREDICTED = {"SLOTS": 4, "BLOCK_N": 1, "BLOCK_D": 2048, "STAGES": 1, "num_warps": 4}
"""One token, gate and then up."""
EXACT = {"SLOTS": 3, "BLOCK_N": 1, "BLOCK_D": 1024, "STAGES": 1, "num_warps": 4}
"""One token, up alone."""
NO_GATE = {"SLOTS": 2, "BLOCK_N": 2, "BLOCK_D": 2048, "STAGES": 1, "num_warps": 4}
"""One token, act alone: no product is computed."""
MIN_DOWN_BLOCK = 64
"""Smallest block of the hidden size in `down`. Every block has a ticket, which is zeroed here."""


class DenseGate(NamedTuple):
    """The activation of all neurons, from `gate`."""

    act_FT: Tensor


class SelectedGate(NamedTuple):
    """A gate that is computed here, for the predicted neurons."""

    first_FD: Tensor
    bias_F: Tensor | None
    threshold: float
    chosen_F: Tensor
    """int32; bit t is set if the predictor selects the neuron for token t."""


def reference(
    x_TD: Tensor,
    on_F: Tensor,
    gate: DenseGate | SelectedGate,
    up_FD: Tensor | None,
    relu_up: bool,
    squared: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute the set's neurons (K,) and their x1 (K, T) in float64."""
    row_K = on_F.nonzero().squeeze(1)
    if isinstance(gate, DenseGate):
        act_KT = gate.act_FT[row_K].double()
    else:
        gate_KT = gate.first_FD[row_K].double() @ x_TD.double().T
        if gate.bias_F is not None:
            gate_KT = gate_KT + gate.bias_F[row_K].double()[:, None]
        gate_KT = gate_KT.to(x_TD.dtype).double()
        token = torch.arange(len(x_TD), device=x_TD.device)
        chosen_KT = (gate.chosen_F[row_K, None] >> token) & 1 == 1
        silent_KT = (gate_KT < gate.threshold) | (gate_KT <= 0) | ~chosen_KT
        act_KT = torch.where(silent_KT, 0, gate_KT)
    if squared:
        act_KT = act_KT.square()
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
    SQUARED: tl.constexpr,
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
    selected = popcount(word)
    if (w == 0) & (tl.program_id(0) == 0):
        _write_counts(mask, entry, count, ticket, F, WORDS, TICKETS, T)
    t = tl.arange(0, T)
    for start in tl.range(tl.program_id(0) * BLOCK_N, selected, SLOTS * BLOCK_N, num_stages=1):
        i = start + tl.arange(0, BLOCK_N)
        in_N = i < selected
        n = w * 16 + kth_bit(word, i)
        ok_NT = in_N[:, None] & (t < tokens)[None, :]
        x1_NT = _x1(
            x, act, first, bias, chosen, up, n, in_N, t, ok_NT, threshold, tokens,
            D, SQUARED, RELU_UP, BLOCK_D, STAGES, T,
        )  # fmt: skip
        k = tl.sum(popcount(before_W), 0) + i  # here, so that weights need not wait for this sum
        _write(row, x1, entry, k, n, in_N, t, ok_NT, x1_NT, tokens, x.dtype.element_ty, T)


@triton.jit
def _write_counts(
    mask, entry, count, ticket, F, WORDS: tl.constexpr, TICKETS: tl.constexpr, T: tl.constexpr
):
    """Write the number of selected neurons, and zero the tickets."""
    total = tl.sum(popcount(words_before(mask, tl.num_programs(1), WORDS)), 0)
    tl.store(count, total)
    if T == 1:
        write_total(entry, F, total)
    tl.store(ticket + tl.arange(0, TICKETS), tl.zeros((TICKETS,), tl.int32))


@triton.jit
def _x1(
    x,
    act,
    first,
    bias,
    chosen,
    up,
    n,
    in_N,
    t,
    ok_NT,
    threshold,
    tokens,
    D: tl.constexpr,
    SQUARED: tl.constexpr,
    RELU_UP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    T: tl.constexpr,
):
    """Compute x1 of neurons n, (N, T) float32."""
    if act is None:
        act_NT = _gate(first, bias, chosen, n, in_N, x, t, threshold, tokens, D, BLOCK_D, STAGES, T)
    else:
        act_NT = tl.load(act + n[:, None] * tokens + t[None, :], mask=ok_NT, other=0.0)
        act_NT = act_NT.to(tl.float32)
    x1_NT = act_NT
    if SQUARED:
        x1_NT = act_NT * act_NT
    if up is not None:
        # All neurons of the dense gate's set fire, so up need not wait for act.
        fires_N = in_N & any_fired(act_NT) if act is None else in_N
        up_NT = products(up, n, fires_N, x, tokens, D, BLOCK_D, STAGES, T)
        if RELU_UP:
            up_NT = tl.maximum(up_NT, 0.0)
        x1_NT = x1_NT * up_NT
    return x1_NT


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
    """Compute the activation of neurons n for the tokens that chose them, (N, T) float32."""
    gate_NT = products(first, n, in_N, x, tokens, D, BLOCK_D, STAGES, T)
    if bias is not None:
        gate_NT += tl.load(bias + n, mask=in_N, other=0.0).to(tl.float32)[:, None]
    act_NT = activated(gate_NT, threshold, x.dtype.element_ty)
    if T > 1:
        chosen_N = tl.load(chosen + n, mask=in_N, other=0)
        act_NT = tl.where((chosen_N[:, None] >> t[None, :]) & 1 == 1, act_NT, 0.0)
    return act_NT


@triton.jit
def _write(
    row, x1, entry, k, n, in_N, t, ok_NT, x1_NT, tokens, dtype: tl.constexpr, T: tl.constexpr
):
    """Write neurons n and their x1, rounded to x's dtype, at places k of the list."""
    x1_NT = rounded(x1_NT, dtype)
    if T == 1:
        write_entries(entry, k, n, tl.sum(x1_NT.to(tl.float32), 1), in_N)
    else:
        tl.store(row + k, n, mask=in_N)
        tl.store(x1 + k[:, None] * tokens + t[None, :], x1_NT, mask=ok_NT)


def gate_up(
    x_TD: Tensor,
    selection: Selection,
    gate: DenseGate | SelectedGate,
    up_FD: Tensor | None,
    *,
    relu_up: bool,
    squared: bool = False,
) -> ActiveList:
    """Launch the kernel for the selected neurons; `up_FD` is None in an FFN without a gate.

    One token consumes `selection.blank_E`, which becomes its list: use each selection once.
    """
    tokens, d = x_TD.shape
    mask_W, blank_E = selection
    device = x_TD.device
    tickets = triton.next_power_of_2(triton.cdiv(d, MIN_DOWN_BLOCK))
    if isinstance(gate, DenseGate):
        act, first, bias, chosen, threshold = gate.act_FT, None, None, None, 0.0
        width = len(gate.act_FT)
    else:
        first, bias, threshold, chosen = gate
        act, width = None, len(gate.first_FD)
    total = torch.empty((), dtype=torch.int32, device=device)
    ticket_C = torch.empty(tickets, dtype=torch.int32, device=device)
    assert (blank_E is None) == (tokens > 1), f"selection: expected one for {tokens} tokens"
    row_F: Tensor | None = None
    x1_FT: Tensor | None = None
    active: ActiveList
    if blank_E is None:
        row_F = torch.empty(width, dtype=torch.int32, device=device)
        x1_FT = torch.empty(width, tokens, dtype=x_TD.dtype, device=device)
        active = BatchList(row_F, x1_FT, total, ticket_C)
    else:
        active = EntryList(blank_E, total, ticket_C)
    config = _config(tokens, act is None, up_FD is not None, d)
    _kernel[(config["SLOTS"], len(mask_W))](
        x_TD, mask_W, act, first, bias, chosen, up_FD, row_F, x1_FT, blank_E, total, ticket_C,
        threshold, tokens, width, D=d, SQUARED=squared, RELU_UP=relu_up,
        WORDS=triton.next_power_of_2(len(mask_W)), TICKETS=tickets, T=padded_tokens(tokens),
        **config, **launch_options(x_TD),
    )  # fmt: skip
    return active


def _config(tokens: int, computes_gate: bool, has_up: bool, d: int) -> dict[str, int]:
    """Return the fastest block sizes measured at hidden sizes of 512 to 8192. If the gate is
    computed here, up follows it row by row, so more programs keep the memory busy meanwhile."""
    if tokens > 1:
        return SEVERAL_TOKENS
    if not computes_gate:
        return EXACT | {"BLOCK_D": 1024 if d < 8192 else 2048} if has_up else NO_GATE
    if d <= 2048:
        return PREDICTED | {"SLOTS": 8, "BLOCK_D": 512, "num_warps": 2}
    return PREDICTED | {"BLOCK_D": 1024} if d % 4096 == 0 else PREDICTED
