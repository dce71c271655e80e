"""PowerInfer's predictor, which selects the neurons of a layer to compute.

    hidden = relu(fc1 . z);  logits = fc2 . hidden;  predicted where logit >= threshold

z and hidden are rounded to the weights' 16-bit dtype, or to q8_0 if the weights are q8_0 or q4_0
(int8_dot.py); sums are in float32. Bytes: both matrices as stored.

Shape letters: T tokens, D hidden size, R rank, F FFN width, W words of 16 neurons.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecast.core.ggml_blocks import round_to_q8_0
from sparsecast.kernels.ops.active_list import Selection, allocate_entries, blank
from sparsecast.kernels.ops.bitmask import WORD, pack
from sparsecast.kernels.ops.compiler import tl, triton
from sparsecast.kernels.ops.dot import products, rounded
from sparsecast.kernels.ops.int8_dot import int8_products, quantize_input
from sparsecast.kernels.ops.launch import (
    after_previous,
    launch_options,
    padded_tokens,
    start_next,
)
from sparsecast.kernels.ops.quantized import Quantized, dequantized

HIDDEN_CONFIGS = {
    1: {"BLOCK_N": 1, "BLOCK_K": 2048, "STAGES": 1, "num_warps": 4},
    16: {"BLOCK_N": 16, "BLOCK_K": 256, "STAGES": 4, "num_warps": 4},
}
SELECT_CONFIGS = {
    1: {"BLOCK_N": 16, "BLOCK_K": 512, "STAGES": 1, "num_warps": 8},
    16: {"BLOCK_N": 32, "BLOCK_K": 128, "STAGES": 4, "num_warps": 2},
}
"""Block sizes of 16-bit weights, by padded tokens."""
HIDDEN_INT8_CONFIGS = {
    False: {"BLOCK_N": 4, "BLOCK_K": 2048, "STAGES": 1, "num_warps": 8},
    True: {"BLOCK_N": 16, "BLOCK_K": 256, "STAGES": 4, "num_warps": 8},
}
"""Block sizes of q8_0 and q4_0 weights, by whether there are more than 4 tokens."""


def input_dtype(weight: Tensor | Quantized) -> torch.dtype:
    """Return the dtype that a product rounds its input to; int8 stands for q8_0."""
    return weight.dtype if isinstance(weight, Tensor) else torch.int8


def rounded_input(x_TK: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the float32 values of an input after its rounding, see `input_dtype`."""
    return round_to_q8_0(x_TK) if dtype == torch.int8 else x_TK.to(dtype).float()


def reference(
    z_TD: Tensor,
    fc1_RD: Tensor | Quantized,
    fc2_FR: Tensor | Quantized,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the rounded hidden_TR in float32 and logits_TF in float64.

    Args:
        dtype: What inputs are rounded to, if fc1's dtype does not say it.
    """
    dtype = dtype or input_dtype(fc1_RD)
    hidden_TR = (rounded_input(z_TD, dtype).double() @ dequantized(fc1_RD).double().T).relu()
    hidden_TR = rounded_input(hidden_TR, dtype)
    return hidden_TR, hidden_TR.double() @ dequantized(fc2_FR).double().T


@triton.jit(do_not_specialize=["tokens"])
def _hidden_kernel(
    z,
    weight,
    scale,
    hidden,
    tokens,
    R,
    K: tl.constexpr,
    BITS: tl.constexpr,
    T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    EARLY: tl.constexpr = BITS == 16 or T == 1
    if BITS == 16:
        after_previous(PDL)
    if EARLY:
        start_next(PDL)
    r = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if BITS == 16:
        hidden_NT = products(weight, r, r < R, z, tokens, K, BLOCK_K, STAGES, T)
        hidden_NT = rounded(tl.maximum(hidden_NT, 0.0), hidden.dtype.element_ty)
    else:
        hidden_NT = int8_products(
            weight, scale, r, r < R, z, tokens, K, BITS, BLOCK_K, STAGES, T, PDL
        )
        hidden_NT = tl.maximum(hidden_NT, 0.0)
    if not EARLY:
        start_next(PDL)
    t = tl.arange(0, T)
    ok_NT = (r < R)[:, None] & (t < tokens)[None, :]
    tl.store(hidden + t[None, :] * R + r[:, None], hidden_NT, mask=ok_NT)


@triton.jit(do_not_specialize=["tokens"])
def _select_kernel(
    hidden,
    weight,
    scale,
    mask,
    chosen,
    entry,
    threshold,
    tokens,
    F,
    K: tl.constexpr,
    BITS: tl.constexpr,
    T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    EARLY: tl.constexpr = BITS == 16 or T == 1
    if EARLY:
        start_next(PDL)
    f = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if BITS == 16:
        logit_NT = products(weight, f, f < F, hidden, tokens, K, BLOCK_K, STAGES, T, PDL)
    else:
        logit_NT = int8_products(
            weight, scale, f, f < F, hidden, tokens, K, BITS, BLOCK_K, STAGES, T, PDL
        )
    if not EARLY:
        start_next(PDL)
    t = tl.arange(0, T)
    on_NT = (logit_NT >= threshold) & (f < F)[:, None] & (t < tokens)[None, :]
    tokens_N = tl.sum(on_NT.to(tl.int32) << t[None, :], 1)
    tl.store(chosen + f, tokens_N, mask=f < F)
    w = tl.program_id(0) * (BLOCK_N // 16) + tl.arange(0, BLOCK_N // 16)
    tl.store(mask + w, pack(tokens_N != 0), mask=w * 16 < F)
    if entry is not None:
        blank(entry, f, F)


def predict(
    z_TD: Tensor, fc1_RD: Tensor | Quantized, fc2_FR: Tensor | Quantized, threshold: float
) -> tuple[Selection, Tensor]:
    """Run both products. Either both weights are `Quantized` or neither is.

    Returns:
        The neurons predicted for any token, and chosen_F int32, in which bit t is set if the neuron
        is predicted for token t.
    """
    return select(hidden(z_TD, fc1_RD), fc2_FR, threshold)


def hidden(z_TD: Tensor, fc1_RD: Tensor | Quantized) -> Tensor:
    """Compute hidden_TR = relu(fc1 . z) in fc1's dtype, or in float32 if fc1 is `Quantized`."""
    (tokens, d), (rank, _) = z_TD.shape, fc1_RD.shape
    weight: tuple[Tensor, Tensor | None]
    if isinstance(fc1_RD, Tensor):
        weight, bits, pad, dtype = (fc1_RD, None), 16, padded_tokens(tokens), fc1_RD.dtype
        config = HIDDEN_CONFIGS[pad]
    else:
        weight, bits, pad, dtype = (*fc1_RD,), fc1_RD.bits, _int8_padded(tokens), torch.float32
        z_TD, config = quantize_input(z_TD), _hidden_int8_config(tokens, d)
    hidden_TR = torch.empty(tokens, rank, dtype=dtype, device=z_TD.device)
    _hidden_kernel[(triton.cdiv(rank, config["BLOCK_N"]),)](
        z_TD, *weight, hidden_TR, tokens, rank,
        K=d, BITS=bits, T=pad, **config, **launch_options(z_TD),
    )  # fmt: skip
    return hidden_TR


def select(
    hidden_TR: Tensor, fc2_FR: Tensor | Quantized, threshold: float
) -> tuple[Selection, Tensor]:
    """Apply fc2 and the threshold; return what `predict` does.

    The kernel may read fc2 while the kernel that writes `hidden_TR` still runs, so fc2 must be
    written before that one launches.
    """
    tokens, (f, rank) = len(hidden_TR), fc2_FR.shape
    weight: tuple[Tensor, Tensor | None]
    if isinstance(fc2_FR, Tensor):
        weight, bits, pad = (fc2_FR, None), 16, padded_tokens(tokens)
        input_TR, config = hidden_TR, _fitted(SELECT_CONFIGS[pad], rank)
    else:
        weight, bits, pad = (*fc2_FR,), fc2_FR.bits, _int8_padded(tokens)
        config = _select_int8_config(tokens, rank)
        input_TR = quantize_input(hidden_TR, early=tokens == 1)
    mask_W = torch.empty(triton.cdiv(f, WORD), dtype=torch.int16, device=input_TR.device)
    chosen_F = torch.empty(f, dtype=torch.int32, device=input_TR.device)
    blank_E = allocate_entries(f, tokens, input_TR.device)
    _select_kernel[(triton.cdiv(f, config["BLOCK_N"]),)](
        input_TR, *weight, mask_W, chosen_F, blank_E, threshold, tokens, f,
        K=rank, BITS=bits, T=pad, **config, **launch_options(input_TR),
    )  # fmt: skip
    return Selection(mask_W, blank_E), chosen_F


def _int8_padded(tokens: int) -> int:
    """Return the columns of an int8 product."""
    return triton.next_power_of_2(tokens) if tokens <= 4 else padded_tokens(tokens)


def _hidden_int8_config(tokens: int, d: int) -> dict[str, int]:
    """Return block sizes of fc1. One token of a 13B or larger model was as fast or faster with two
    rows per program. Up to 256 columns, most of a larger tile would be empty."""
    config = HIDDEN_INT8_CONFIGS[tokens > 4]
    if tokens == 1 and d > 4096:
        return config | {"BLOCK_N": 2, "num_warps": 4}
    return config if d > 256 else config | {"BLOCK_K": 256}


def _select_int8_config(tokens: int, rank: int) -> dict[str, int]:
    """Return block sizes of fc2. Up to 4 tokens a program holds all its weights in registers, so a
    higher rank needs more warps; STAGES has an effect only above 4 tokens."""
    columns = 128 if tokens > 4 else 512 if rank >= 2048 else 256 if tokens == 1 else 128
    warps = 4 if tokens > 4 else min(16, 4 * triton.next_power_of_2(triton.cdiv(rank, 2048)))
    return {"BLOCK_N": 16, "BLOCK_K": columns, "STAGES": 1, "num_warps": warps}


def _fitted(config: dict[str, int], rank: int) -> dict[str, int]:
    """Return smaller tiles if the large ones do not divide the rank (such as 1280); they were
    faster."""
    if config["BLOCK_K"] > 256 and rank % config["BLOCK_K"]:
        return config | {"BLOCK_K": 256, "num_warps": config["num_warps"] // 2}
    return config
