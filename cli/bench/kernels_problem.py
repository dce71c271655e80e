"""Random FFNs and predictors in which a chosen set of neurons fires.

Each token has an input coordinate of its own. There, every gate row holds +0.5 or -0.5, which adds
+4 to the gate if the neuron is to fire and -4 if not, to noise of standard deviation 1. A hidden
unit of the predictor does the same for the logits. No value is zero and the kernels make every
decision themselves; 3 in 100,000 go the other way.

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
    """Which neurons fire for each token, and which are predicted to."""

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
    """FFN inputs (T, D), which serve as predictor inputs too; the tokens' own coordinates first."""
    x_TD = torch.randn(tokens, d, device=device)
    x_TD[:, :tokens] = AMPLITUDE * torch.eye(tokens, device=device)
    return x_TD.to(dtype)


def matrix(f: int, d: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random (F, D) weights whose products with an input are of order 1."""
    return torch.randn(f, d, device=device, dtype=dtype).mul_(d**-0.5)


def norm(f: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, float]:
    """Random weights of an RMS norm, from 0 to 1, and BitNet's epsilon."""
    return torch.rand(f, device=device).to(dtype), 1e-5


def ffn(
    active_TF: Tensor,
    d: int,
    dtype: torch.dtype,
    matrices: int = 3,
    act: str = "relu",
    *,
    x1_norm: bool = False,
) -> FFN:
    """An FFN of three matrices or two, in which `active_TF` fires.

    Args:
        act: relu or relu2.
        x1_norm: Whether an RMS norm stands between x1 and down.
    """
    tokens, f = active_TF.shape
    first_FD, second_FD = (matrix(f, d, dtype, active_TF.device) for _ in range(2))
    first_FD[:, :tokens] = _signs(active_TF) * 4 / AMPLITUDE
    weights = FFN(None, first_FD, second_FD, act=act)
    if matrices == 3:
        weights = FFN(first_FD, second_FD, matrix(f, d, dtype, active_TF.device), act=act)
    if x1_norm:
        norm_F, eps = norm(f, dtype, active_TF.device)
        weights = weights._replace(x1_norm_F=norm_F, x1_norm_eps=eps)
    return weights


def predictor(
    predicted_TF: Tensor, d: int, rank: int, dtype: str, kept: torch.dtype
) -> PredictorWeights:
    """A predictor that predicts `predicted_TF`.

    Args:
        dtype: f16, q8_0 or q4_0.
        kept: The torch dtype that f16 weights have.
    """
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
