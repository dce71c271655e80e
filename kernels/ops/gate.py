"""The first step of the exact path: a dense first projection, its activation, and the neurons that
fired.

    g = first . x + bias, rounded to x's dtype;  act = g if g >= T and g > 0 else 0

The first projection is the gate, or `up` in an FFN without one. The decision is made on g as the
dense model rounds it. T is 0 for ReLU. Bytes: the whole matrix.

Shape letters: T tokens, D hidden, F FFN width, W words of 16 neurons.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecast.kernels.ops.active_list import Selection, allocate_entries, blank
from sparsecast.kernels.ops.bitmask import WORD, pack
from sparsecast.kernels.ops.compiler import tl, triton
from sparsecast.kernels.ops.dot import products, rounded
from sparsecast.kernels.ops.launch import (
    after_previous,
    launch_options,
    padded_tokens,
    start_next,
)

CONFIGS = {
    1: {"BLOCK_F": 16, "BLOCK_D": 512, "STAGES": 3, "num_warps": 4},
    16: {"BLOCK_F": 64, "BLOCK_D": 128, "STAGES": 3, "num_warps": 4},
}
"""Block sizes by padded tokens."""


def reference(
    x_TD: Tensor, first_FD: Tensor, bias_F: Tensor | None, threshold: float
) -> tuple[Tensor, Tensor]:
    """Compute what the kernel must return, with sums in float64: act_FT in x's dtype, and as bools
    the neurons that fired for any token."""
    gate_TF = x_TD.double() @ first_FD.double().T
    if bias_F is not None:
        gate_TF = gate_TF + bias_F.double()
    gate_TF = gate_TF.to(x_TD.dtype)
    act_TF = torch.where((gate_TF < threshold) | (gate_TF <= 0), 0, gate_TF)
    return act_TF.T.contiguous(), (act_TF != 0).any(0)


@triton.jit
def activated(gate, threshold, dtype: tl.constexpr):
    """Round float32 gates to `dtype` and apply the activation; return float32. NaN fires."""
    gate = rounded(gate, dtype).to(tl.float32)
    return tl.where((gate < threshold) | (gate <= 0), 0.0, gate)


@triton.jit
def any_fired(act_NT):
    """Return which neurons fired for any token."""
    return tl.max((act_NT != 0).to(tl.int32), 1) > 0


@triton.jit(do_not_specialize=["tokens"])
def _kernel(
    x,
    first,
    bias,
    act,
    mask,
    entry,
    threshold,
    tokens,
    F,
    D: tl.constexpr,
    T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    after_previous(PDL)
    start_next(PDL)
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    gate_FT = products(first, f, f < F, x, tokens, D, BLOCK_D, STAGES, T)
    if bias is not None:
        gate_FT += tl.load(bias + f, mask=f < F, other=0.0).to(tl.float32)[:, None]
    act_FT = activated(gate_FT, threshold, x.dtype.element_ty)
    t = tl.arange(0, T)
    ok_FT = (f < F)[:, None] & (t < tokens)[None, :]
    act_FT = tl.where(ok_FT, act_FT, 0.0)
    tl.store(
        act + f[:, None] * tokens + t[None, :], rounded(act_FT, x.dtype.element_ty), mask=ok_FT
    )
    w = tl.program_id(0) * (BLOCK_F // 16) + tl.arange(0, BLOCK_F // 16)
    tl.store(mask + w, pack(any_fired(act_FT)), mask=w * 16 < F)
    if entry is not None:
        blank(entry, f, F)


def gate(
    x_TD: Tensor, first_FD: Tensor, bias_F: Tensor | None, threshold: float
) -> tuple[Tensor, Selection]:
    """Launch the kernel.

    Args:
        threshold: T, already rounded to x's dtype.

    Returns:
        act_FT in x's dtype, 0 where a neuron did not fire for a token, and the selection of the
        neurons that fired for any token.
    """
    (tokens, d), (f, _) = x_TD.shape, first_FD.shape
    pad = padded_tokens(tokens)
    act_FT = torch.empty(f, tokens, dtype=x_TD.dtype, device=x_TD.device)
    mask_W = torch.empty(triton.cdiv(f, WORD), dtype=torch.int16, device=x_TD.device)
    blank_E = allocate_entries(f, tokens, x_TD.device)
    config = CONFIGS[pad]
    _kernel[(triton.cdiv(f, config["BLOCK_F"]),)](
        x_TD, first_FD, bias_F, act_FT, mask_W, blank_E, threshold, tokens, f,
        D=d, T=pad, **config, **launch_options(x_TD),
    )  # fmt: skip
    return act_FT, Selection(mask_W, blank_E)
