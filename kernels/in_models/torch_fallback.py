"""The FFN in plain torch, for what the kernels do not run: other devices, float32, many tokens.

    dense        all rows; neurons that are not predicted are set to zero
    over_rows    up and down over the rows that some token needs, and with a prediction the gate
                 too. Finding the rows waits for the device, so this is meant for a CPU

Both decide as the kernels do: the gate in its own dtype, predictions in float32 from inputs that
are rounded as the predictor's weights require.

Shape letters: T tokens, D hidden, F FFN width, R rank, K rows that some token needs.
"""

from __future__ import annotations

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
    x1_TF = _activated(functional.linear(x_TD, first, ffn.up_bias_F), _threshold(ffn))
    if predicted_TF is not None:
        x1_TF = x1_TF * predicted_TF
    if ffn.gate_FD is not None:
        up_TF = functional.linear(x_TD, ffn.up_FD)
        x1_TF = x1_TF * (up_TF.relu() if ffn.act == "drelu" else up_TF)
    return functional.linear(x1_TF, ffn.down_FD.T, ffn.down_bias_D)


def over_rows(x_TD: Tensor, ffn: FFN, predicted_TF: Tensor | None = None) -> Tensor:
    """Compute the FFN from the rows that some token needs, (T, D) in the input's dtype."""
    weights = (ffn.gate_FD, ffn.up_FD, ffn.down_FD, ffn.up_bias_F, ffn.down_bias_D)
    with torch.autocast(x_TD.device.type, enabled=False):  # sums stay in the weights' dtype
        y_TD: Tensor = _over_rows(x_TD, predicted_TF, *weights, _threshold(ffn), ffn.act == "drelu")
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
    threshold: float,
    relu_up: bool,
) -> torch.Tensor:
    first = up if gate is None else gate
    if predicted is None:
        act_TF = _activated(functional.linear(x, first, up_bias), threshold)
        some_K = _indices_of_any(act_TF)
    else:
        some_K = _indices_of_any(predicted)
    y = torch.zeros_like(x) if down_bias is None else down_bias.expand_as(x).clone()
    for row_K in some_K.split(max(16, CHUNK // x.shape[1])):
        if predicted is None:
            x1_TK = act_TF.index_select(1, row_K)
        else:
            bias_K = None if up_bias is None else up_bias[row_K]
            gate_TK = functional.linear(x, first.index_select(0, row_K), bias_K)
            act_TK = _activated(gate_TK, threshold) * predicted.index_select(1, row_K)
            fired_K = _indices_of_any(act_TK)
            row_K, x1_TK = row_K[fired_K], act_TK.index_select(1, fired_K)
        if gate is not None:
            up_TK = functional.linear(x, up.index_select(0, row_K))
            x1_TK = x1_TK * (up_TK.relu() if relu_up else up_TK)
        y.addmm_(x1_TK, down.index_select(0, row_K))
    return y


@_over_rows.register_fake
def _shape(x: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(x)


def _activated(gate_TF: Tensor, threshold: float) -> Tensor:
    return torch.where(gate_TF < threshold, 0, gate_TF).relu()


def _indices_of_any(on_TF: Tensor) -> Tensor:
    return on_TF.any(0).nonzero().squeeze(1)


def _threshold(ffn: FFN) -> float:
    return ffn.threshold if ffn.act == "fatrelu" else 0.0
