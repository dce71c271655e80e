"""Random FFNs and predictors that select exactly what a benchmark asks for.

Token t has a coordinate of its own in the input, where every gate row holds +0.5 or -0.5: beside
noise of standard deviation 1, +4 where the neuron shall fire and -4 where it shall not. A hidden
unit of the predictor does the same for its logits. Nothing is zero, and every decision is made by
the kernels themselves; 3 in 100,000 fall the other way.

Shape letters: T tokens, D hidden, F FFN width, R rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsecast.kernels.ops.ffn import FFN, PredictorWeights
from sparsecast.kernels.ops.quantized import quantized

RECALL = 0.92
PREDICTED_PER_ACTIVE = 0.21 / 0.11
"""Predicted sparsity 0.79 at a true sparsity of 0.89."""
AMPLITUDE = 8.0


class Targets(NamedTuple):
    """Who shall fire and who shall be predicted."""

    active_TF: Tensor
    predicted_TF: Tensor


def targets(f: int, tokens: int, sparsity: float, device: torch.device) -> Targets:
    """Independent random sets per token: 1 - sparsity active, `RECALL` of them predicted."""
    active = round(f * (1 - sparsity))
    hit = round(active * RECALL)
    predicted = min(f, max(hit, round(active * PREDICTED_PER_ACTIVE)))
    if sparsity == 0:
        hit = active
    order_TF = torch.rand(tokens, f, device=device).argsort(1)
    rank_TF = order_TF.argsort(1)
    predicted_TF = (rank_TF < hit) | ((rank_TF >= active) & (rank_TF < active + predicted - hit))
    return Targets(rank_TF < active, predicted_TF)


def inputs(tokens: int, d: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """x_TD (and z_TD), with the tokens' own coordinates first."""
    x_TD = torch.randn(tokens, d, device=device)
    x_TD[:, :tokens] = AMPLITUDE * torch.eye(tokens, device=device)
    return x_TD.to(dtype)


def matrix(f: int, d: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(F, D) whose products with an input are of order 1."""
    return torch.randn(f, d, device=device, dtype=dtype).mul_(d**-0.5)


def ffn(active_TF: Tensor, d: int, dtype: torch.dtype, matrices: int = 3) -> FFN:
    """An FFN with ReLU that fires as told, of three matrices or of two."""
    tokens, f = active_TF.shape
    first_FD, second_FD = (matrix(f, d, dtype, active_TF.device) for _ in range(2))
    first_FD[:, :tokens] = _signs(active_TF) * 4 / AMPLITUDE
    if matrices == 2:
        return FFN(None, first_FD, second_FD)
    return FFN(first_FD, second_FD, matrix(f, d, dtype, active_TF.device))


def predictor(
    predicted_TF: Tensor, d: int, rank: int, dtype: str, kept: torch.dtype
) -> PredictorWeights:
    """A predictor in `dtype` (f16, q8_0, q4_0; f16 means `kept`) that predicts as told."""
    tokens, f = predicted_TF.shape
    device = predicted_TF.device
    fc1_RD = matrix(rank, d, torch.float32, device)
    fc1_RD[:tokens] = 0
    fc1_RD[:tokens, :tokens] = 2 * torch.eye(tokens, device=device)
    fc2_FR = matrix(f, rank, torch.float32, device) * 2**0.5
    fc2_FR[:, :tokens] = _signs(predicted_TF) * 4 / (2 * AMPLITUDE)
    if dtype == "f16":
        return PredictorWeights(fc1_RD.to(kept), fc2_FR.to(kept))
    return PredictorWeights(quantized(fc1_RD, dtype), quantized(fc2_FR, dtype))


def _signs(on_TF: Tensor) -> Tensor:
    return on_TF.T.float() * 2 - 1
