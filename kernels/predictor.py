"""PowerInfer's predictor: which neurons of a layer to compute.

    hidden = relu(fc1 . z);  logits = fc2 . hidden;  predicted where logit >= threshold

z and hidden are rounded to the weights' 16-bit type, or float16 for q8_0 and q4_0; sums are in
float32. Bytes: both matrices as stored.

Shape letters: T tokens, D hidden size, R rank, F FFN width, W words of 16 neurons.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsecast.kernels.bits import WORD, words
from sparsecast.kernels.launch import after_previous, options, padded, start_next
from sparsecast.kernels.products import code_products, products, rounded
from sparsecast.kernels.quantised import Quantised, dequantised

HIDDEN_CONFIGS = {
    (1, 16): {"BLOCK_N": 1, "BLOCK_K": 2048, "STAGES": 1, "num_warps": 4},
    (1, 8): {"BLOCK_N": 1, "BLOCK_K": 2048, "STAGES": 1, "num_warps": 4},
    (1, 4): {"BLOCK_N": 2, "BLOCK_K": 2048, "STAGES": 1, "num_warps": 4},
    (16, 16): {"BLOCK_N": 16, "BLOCK_K": 256, "STAGES": 4, "num_warps": 4},
    (16, 8): {"BLOCK_N": 16, "BLOCK_K": 256, "STAGES": 4, "num_warps": 2},
    (16, 4): {"BLOCK_N": 16, "BLOCK_K": 512, "STAGES": 3, "num_warps": 4},
}
SELECT_CONFIGS = {
    (1, 16): {"BLOCK_N": 16, "BLOCK_K": 512, "STAGES": 1, "num_warps": 8},
    (1, 8): {"BLOCK_N": 16, "BLOCK_K": 256, "STAGES": 1, "num_warps": 8},
    (1, 4): {"BLOCK_N": 16, "BLOCK_K": 256, "STAGES": 1, "num_warps": 4},
    (16, 16): {"BLOCK_N": 32, "BLOCK_K": 128, "STAGES": 4, "num_warps": 2},
    (16, 8): {"BLOCK_N": 64, "BLOCK_K": 128, "STAGES": 3, "num_warps": 4},
    (16, 4): {"BLOCK_N": 64, "BLOCK_K": 256, "STAGES": 3, "num_warps": 4},
}
"""By padded tokens (1 serves up to 4 that meet codes) and bits of a weight."""


def reference(
    z_TD: Tensor, fc1_RD: Tensor | Quantised, fc2_FR: Tensor | Quantised
) -> tuple[Tensor, Tensor]:
    """hidden_TR as the kernel keeps it, and logits_TF in float64."""
    kept = _kept(fc1_RD)
    hidden_TR = (z_TD.to(kept).double() @ dequantised(fc1_RD).double().T).relu().to(kept)
    return hidden_TR, hidden_TR.double() @ dequantised(fc2_FR).double().T


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
    after_previous(PDL)
    start_next(PDL)
    r = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if BITS == 16:
        hidden_NT = products(weight, r, r < R, z, tokens, K, BLOCK_K, STAGES, T)
    else:
        hidden_NT = code_products(
            weight, scale, r, r < R, z, tokens, K, BITS, BLOCK_K, STAGES, T, PDL=False
        )
    t = tl.arange(0, T)
    tl.store(
        hidden + t[None, :] * R + r[:, None],
        rounded(tl.maximum(hidden_NT, 0.0), hidden.dtype.element_ty),
        mask=(r < R)[:, None] & (t < tokens)[None, :],
    )


@triton.jit(do_not_specialize=["tokens"])
def _select_kernel(
    hidden,
    weight,
    scale,
    mask,
    chosen,
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
    start_next(PDL)
    f = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if BITS == 16:
        logit_NT = products(weight, f, f < F, hidden, tokens, K, BLOCK_K, STAGES, T, PDL)
    else:
        logit_NT = code_products(
            weight, scale, f, f < F, hidden, tokens, K, BITS, BLOCK_K, STAGES, T, PDL
        )
    t = tl.arange(0, T)
    on_NT = (logit_NT >= threshold) & (f < F)[:, None] & (t < tokens)[None, :]
    tokens_N = tl.sum(on_NT.to(tl.int32) << t[None, :], 1)
    tl.store(chosen + f, tokens_N, mask=f < F)
    w = tl.program_id(0) * (BLOCK_N // 16) + tl.arange(0, BLOCK_N // 16)
    tl.store(mask + w, words(tokens_N != 0), mask=w * 16 < F)


def predict(
    z_TD: Tensor, fc1_RD: Tensor | Quantised, fc2_FR: Tensor | Quantised, threshold: float
) -> tuple[Tensor, Tensor]:
    """Run both products.

    Returns:
        mask_W, the neurons predicted for any token, and chosen_F int32, whose bit t says whether
        token t's prediction has that neuron.
    """
    hidden_TR = hidden(z_TD, fc1_RD)
    return select(hidden_TR, fc2_FR, threshold)


def hidden(z_TD: Tensor, fc1_RD: Tensor | Quantised) -> Tensor:
    """relu(fc1 . z), (T, R) in the weights' 16-bit type."""
    (tokens, d), (rank, _) = z_TD.shape, fc1_RD.shape
    hidden_TR = torch.empty(tokens, rank, dtype=_kept(fc1_RD), device=z_TD.device)
    bits = _bits(fc1_RD)
    pad, config = _tiles(HIDDEN_CONFIGS, tokens, bits)
    _hidden_kernel[(triton.cdiv(rank, config["BLOCK_N"]),)](
        z_TD, *_parts(fc1_RD), hidden_TR, tokens, rank,
        K=d, BITS=bits, T=pad, **config, **options(z_TD),
    )  # fmt: skip
    return hidden_TR


def select(
    hidden_TR: Tensor, fc2_FR: Tensor | Quantised, threshold: float
) -> tuple[Tensor, Tensor]:
    """fc2, the threshold and the set; returns what `predict` does.

    It reads fc2 before the kernel in front of it has ended, which must be `hidden`.
    """
    (tokens, rank), (f, _) = hidden_TR.shape, fc2_FR.shape
    device = hidden_TR.device
    mask_W = torch.empty(triton.cdiv(f, WORD), dtype=torch.int16, device=device)
    chosen_F = torch.empty(f, dtype=torch.int32, device=device)
    bits = _bits(fc2_FR)
    pad, config = _tiles(SELECT_CONFIGS, tokens, bits)
    config = _fitted(config, rank)
    _select_kernel[(triton.cdiv(f, config["BLOCK_N"]),)](
        hidden_TR, *_parts(fc2_FR), mask_W, chosen_F, threshold, tokens, f,
        K=rank, BITS=bits, T=pad, **config, **options(hidden_TR),
    )  # fmt: skip
    return mask_W, chosen_F


def _kept(weight: Tensor | Quantised) -> torch.dtype:
    """The type that inputs of a product by this weight are rounded to."""
    return weight.dtype if isinstance(weight, Tensor) else torch.float16


def _parts(weight: Tensor | Quantised) -> tuple[Tensor, Tensor]:
    return (weight, weight) if isinstance(weight, Tensor) else (weight.code_NC, weight.scale_NB)


def _bits(weight: Tensor | Quantised) -> int:
    return 16 if isinstance(weight, Tensor) else weight.bits


def _fitted(config: dict[str, int], rank: int) -> dict[str, int]:
    """f16 weights of a rank such as 1280, which large tiles do not divide, were faster in small
    ones."""
    if config["BLOCK_K"] > 256 and rank % config["BLOCK_K"]:
        return config | {"BLOCK_K": 256, "num_warps": config["num_warps"] // 2}
    return config


def _tiles(
    table: dict[tuple[int, int], dict[str, int]], tokens: int, bits: int
) -> tuple[int, dict[str, int]]:
    """Padded tokens, and the blocks for them."""
    if bits < 16 and tokens <= 4:
        return triton.next_power_of_2(tokens), table[1, bits]
    pad = padded(tokens)
    return pad, table[pad, bits]
