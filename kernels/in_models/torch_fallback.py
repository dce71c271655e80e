"""The FFN in plain torch, for what the kernels do not run: other devices, float32, many tokens.

    dense        all rows; neurons that are not predicted are set to zero
    over_rows    up and down over the rows that some token needs, and with a prediction the gate
                 too. Finding the rows waits for the device, so this is meant for a CPU

Both decide as the kernels do: the gate in its own dtype, predictions in float32 from inputs that
are rounded as the predictor's weights require. As there, the square of ReLU² and an RMS norm of x1
are computed in float32 (float64 if the weights are).

Shape letters: T tokens, D hidden, F FFN width, R rank, K rows that some token needs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from sparsecast.kernels.ops.ffn import FFN, PredictorWeights
from sparsecast.kernels.ops.predictor import input_dtype, rounded_input
from sparsecast.kernels.ops.quantized import dequantized

CHUNK = 2**20
"""Weights that `over_rows` copies at a time: 4 MiB in float32, small enough for a cache and large
enough that threads seldom wait for each other."""


def predicted(z_TD: Tensor, predictor: PredictorWeights) -> Tensor:
    """Return the predicted neurons, (T, F) bools, for inputs of any float dtype."""
    dtype = predictor.input_dtype or input_dtype(predictor.fc1_RD)
    fc1_RD, fc2_FR = (dequantized(weight) for weight in predictor[:2])
    hidden_TR = functional.linear(rounded_input(z_TD, dtype), fc1_RD).relu()
    logits_TF = functional.linear(rounded_input(hidden_TR, dtype), fc2_FR)
    return logits_TF >= predictor.threshold


def dense(x_TD: Tensor, ffn: FFN, predicted_TF: Tensor | None = None) -> Tensor:
    """Compute the FFN with dense products, (T, D) in the input's dtype."""
    first = ffn.up_FD if ffn.gate_FD is None else ffn.gate_FD
    act_TF = _activated(functional.linear(x_TD, first, ffn.up_bias_F), _threshold(ffn))
    if predicted_TF is not None:
        act_TF = act_TF * predicted_TF
    up_TF = None if ffn.gate_FD is None else functional.linear(x_TD, ffn.up_FD)
    x1_TF = _x1(act_TF, up_TF, ffn.act)
    if ffn.x1_norm_F is not None:
        scale_T1 = _norm_scale([x1_TF], ffn.x1_norm_F, ffn.x1_norm_eps)
        x1_TF = _normed(x1_TF, scale_T1, ffn.x1_norm_F)
    return functional.linear(x1_TF, ffn.down_FD.T, ffn.down_bias_D)


def over_rows(x_TD: Tensor, ffn: FFN, predicted_TF: Tensor | None = None) -> Tensor:
    """Compute the FFN from the rows that some token needs, (T, D) in the input's dtype."""
    with torch.autocast(x_TD.device.type, enabled=False):  # sums stay in the weights' dtype
        y_TD: Tensor = _over_rows(
            x_TD, predicted_TF, *ffn.weights, ffn.act, _threshold(ffn), ffn.x1_norm_eps
        )
    return y_TD


@torch.library.custom_op("sparsecast::ffn_over_rows", mutates_args=())
def _over_rows(
    x: torch.Tensor,
    predicted: torch.Tensor | None,
    gate: torch.Tensor | None,
    up: torch.Tensor,
    down: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    x1_norm: torch.Tensor | None,
    act: str,
    threshold: float,
    x1_norm_eps: float,
) -> torch.Tensor:
    y = torch.zeros_like(x) if down_bias is None else down_bias.expand_as(x).clone()
    some = _x1_of_rows(x, predicted, gate, up, up_bias, act, threshold)
    if x1_norm is not None:
        some = _normed_rows(list(some), x1_norm, x1_norm_eps)
    for row_K, x1_TK in some:
        y.addmm_(x1_TK, down.index_select(0, row_K))
    return y


@_over_rows.register_fake
def _shape(x: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(x)


def _x1_of_rows(
    x_TD: Tensor,
    predicted_TF: Tensor | None,
    gate_FD: Tensor | None,
    up_FD: Tensor,
    up_bias_F: Tensor | None,
    act: str,
    threshold: float,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the neurons that some token needs, chunk by chunk, and their x1."""
    first_FD = up_FD if gate_FD is None else gate_FD
    if predicted_TF is None:
        act_TF = _activated(functional.linear(x_TD, first_FD, up_bias_F), threshold)
        some_K = _indices_of_any(act_TF)
    else:
        some_K = _indices_of_any(predicted_TF)
    for row_K in some_K.split(max(16, CHUNK // x_TD.shape[1])):
        if predicted_TF is None:
            act_TK = act_TF.index_select(1, row_K)
        else:
            bias_K = None if up_bias_F is None else up_bias_F[row_K]
            gate_TK = functional.linear(x_TD, first_FD.index_select(0, row_K), bias_K)
            act_TK = _activated(gate_TK, threshold) * predicted_TF.index_select(1, row_K)
            fired_K = _indices_of_any(act_TK)
            row_K, act_TK = row_K[fired_K], act_TK.index_select(1, fired_K)
        up_TK = None
        if gate_FD is not None:
            up_TK = functional.linear(x_TD, up_FD.index_select(0, row_K))
        yield row_K, _x1(act_TK, up_TK, act)


def _normed_rows(
    some: list[tuple[Tensor, Tensor]], norm_F: Tensor, eps: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the rows with their x1 behind the norm; all other neurons of the FFN are zero."""
    scale_T1 = _norm_scale([x1_TK for _, x1_TK in some], norm_F, eps)
    for row_K, x1_TK in some:
        yield row_K, _normed(x1_TK, scale_T1, norm_F[row_K])


def _norm_scale(x1: list[Tensor], norm_F: Tensor, eps: float) -> Tensor:
    """Return 1 / sqrt(mean square + eps) of each token, (T, 1), for x1 in parts of (T, K)."""
    squares = [part_TK.to(_wide(norm_F)).square().sum(1, keepdim=True) for part_TK in x1]
    return (torch.stack(squares).sum(0) / len(norm_F) + eps).rsqrt()


def _normed(x1_TK: Tensor, scale_T1: Tensor, norm_K: Tensor) -> Tensor:
    return (x1_TK * scale_T1 * norm_K).to(x1_TK.dtype)


def _x1(act_TK: Tensor, up_TK: Tensor | None, act: str) -> Tensor:
    """Compute x1 in the gate's dtype; `up_TK` is None in an FFN without a gate."""
    x1_TK = act_TK.to(_wide(act_TK)).square() if act == "relu2" else act_TK
    if up_TK is not None:
        x1_TK = x1_TK * (up_TK.relu() if act == "drelu" else up_TK)
    return x1_TK.to(act_TK.dtype)


def _wide(like: Tensor) -> torch.dtype:
    return torch.promote_types(like.dtype, torch.float32)


def _activated(gate_TF: Tensor, threshold: float) -> Tensor:
    return torch.where(gate_TF < threshold, 0, gate_TF).relu()


def _indices_of_any(on_TF: Tensor) -> Tensor:
    return on_TF.any(0).nonzero().squeeze(1)


def _threshold(ffn: FFN) -> float:
    return ffn.threshold if ffn.act == "fatrelu" else 0.0
