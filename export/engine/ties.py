"""Sum predictor logits near the threshold in the order of the engine's vector code.

Codes of quantized weights are small integers, so terms often cancel. A sum may be 0 in exact
arithmetic, an active neuron at threshold 0, and -1e-9 in the engine's, a skipped neuron. A logit
that rounding could move across the threshold is therefore computed again as by
`ggml_vec_dot_q4_0_q8_0` and `ggml_vec_dot_q8_0_q8_0` with AVX2 (PowerInfer's ggml-quants.c at
d3ebd7c): eight float32 sums, the k-th over elements 4 k to 4 k + 3 of every block, added in halves
at the end. Other processors add in other orders, so there such a neuron is a coin toss.

Shape letters: T tokens, R rank, F FFN width, B blocks of 32, M logits near the threshold.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecast.core.ggml_blocks import quantize_q8_0_input

NEAR = 2.0**-20
"""16 float32 roundings, relative to the product of norms, which bounds the sum of the terms."""
LANES = 8
AT_ONCE = 2**14


def resolve_ties(
    logits_TF: Tensor, hidden_TR: Tensor, scale_FB: Tensor, code_FBK: Tensor, threshold: float
) -> Tensor:
    """Replace the logits near the threshold by the engine's.

    Args:
        hidden_TR: Input of fc2, float32, before rounding.
        scale_FB, code_FBK: Blocks of fc2; scales float32, codes int8 (F, B, 32).
    """
    scale_TB, code_TBK = quantize_q8_0_input(hidden_TR)
    size_T = (scale_TB.square() * code_TBK.square().sum(-1)).sum(-1).sqrt()
    size_F = (scale_FB.square() * code_FBK.float().square().sum(-1)).sum(-1).sqrt()
    bound_TF = NEAR * size_T[:, None] * size_F
    near_TF = ((logits_TF - threshold).abs() <= bound_TF) & (bound_TF > 0)
    near = near_TF.nonzero(as_tuple=True)
    if len(near[0]) == 0:
        return logits_TF
    sums = [
        _lanes(code_TBK[t], code_FBK[j], scale_TB[t] * scale_FB[j])
        for t, j in zip(*(torch.split(index_M, AT_ONCE) for index_M in near), strict=True)
    ]
    return logits_TF.index_put(near, torch.cat(sums))


def _lanes(x_MBK: Tensor, w_MBK: Tensor, scale_MB: Tensor) -> Tensor:
    """Compute (M,) float32 dot products; the product of two f16 scales is exact in float32."""
    m, blocks = scale_MB.shape
    whole_MBL = (x_MBK * w_MBK).view(m, blocks, LANES, -1).sum(-1).double()
    sum_ML = torch.zeros(m, LANES)
    for b in range(blocks):  # a fused multiply-add rounds once
        sum_ML = (sum_ML.double() + scale_MB[:, b, None].double() * whole_MBL[:, b]).float()
    while sum_ML.shape[1] > 1:
        first, second = sum_ML.chunk(2, dim=1)
        sum_ML = first + second
    return sum_ML[:, 0]
