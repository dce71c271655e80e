"""A ReLU-sparse FFN that reads the weights it needs: exactly, or behind a predictor.

    exact       gate over all neurons, then up and down where the gate fired
    predicted   gate over the neurons that the predictor names, then up and down where it fired

An FFN of two matrices has no gate: its first projection takes the gate's place, and down follows.
Decisions are per token. Weight rows are read for the union of a batch's tokens; where a token did
not select a neuron, that neuron adds nothing to it.

Shape letters: T tokens (1 to 16), D hidden, F FFN width, R rank of the predictor.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsecast.kernels.quantised import Quantised, dequantised


class FFN(NamedTuple):
    """The weights of one layer's FFN, all of one 16-bit dtype, contiguous."""

    gate_FD: Tensor | None
    """None in an FFN of two matrices."""
    up_FD: Tensor
    down_FD: Tensor
    """One row per neuron: the transpose of what `nn.Linear` keeps."""
    up_bias_F: Tensor | None = None
    """Biases belong to FFNs of two matrices alone (OPT)."""
    down_bias_D: Tensor | None = None
    act: str = "relu"
    """relu, fatrelu, or drelu: ReLU on gate and up."""
    threshold: float = 0.0
    """T of FATReLU, >= 0; it is rounded to the weights' dtype."""


class PredictorWeights(NamedTuple):
    """logits = fc2 @ relu(fc1 @ z); a neuron is predicted where its logit >= threshold."""

    fc1_RD: Tensor | Quantised
    """A float16 or bfloat16 tensor, or blocks of q8_0 or q4_0."""
    fc2_FR: Tensor | Quantised
    threshold: float = 0.0


def exact_ffn(x_TD: Tensor, ffn: FFN) -> tuple[Tensor, Tensor]:
    """The FFN without a predictor.

    Args:
        x_TD: The FFN's (normed) input, 1 to 16 tokens, of the weights' dtype.

    Returns:
        y_TD in the input's dtype, and on the device as int32 how many neurons were active for any
        of the tokens.
    """
    return exact_reference(x_TD, ffn)


def predicted_ffn(
    x_TD: Tensor, z_TD: Tensor, ffn: FFN, predictor: PredictorWeights
) -> tuple[Tensor, Tensor]:
    """The FFN of the neurons that the predictor names.

    Args:
        x_TD: The FFN's (normed) input, 1 to 16 tokens, of the weights' dtype.
        z_TD: The predictor's input: where PowerInfer takes it, the residual before the FFN's norm.

    Returns:
        y_TD in the input's dtype, and on the device as int32 how many neurons were predicted for
        any of the tokens.
    """
    return predicted_reference(x_TD, z_TD, ffn, predictor)


def exact_reference(x_TD: Tensor, ffn: FFN) -> tuple[Tensor, Tensor]:
    """`exact_ffn` in plain torch, sums in float64."""
    x1_TF = _x1(x_TD, ffn)
    return _down(x1_TF, ffn, x_TD.dtype), _union(x1_TF != 0)


def predicted_reference(
    x_TD: Tensor, z_TD: Tensor, ffn: FFN, predictor: PredictorWeights
) -> tuple[Tensor, Tensor]:
    """`predicted_ffn` in plain torch, sums in float64."""
    fc1_RD, fc2_FR = (dequantised(w).double() for w in (predictor.fc1_RD, predictor.fc2_FR))
    hidden_TR = (z_TD.double() @ fc1_RD.T).relu()
    predicted_TF = hidden_TR @ fc2_FR.T >= predictor.threshold
    y_TD = _down(_x1(x_TD, ffn) * predicted_TF, ffn, x_TD.dtype)
    return y_TD, _union(predicted_TF)


def _x1(x_TD: Tensor, ffn: FFN) -> Tensor:
    """The input of the down projection, (T, F) float64; the gate decides rounded to its dtype."""
    first = ffn.up_FD if ffn.gate_FD is None else ffn.gate_FD
    gate_TF = x_TD.double() @ first.double().T
    if ffn.up_bias_F is not None:
        gate_TF = gate_TF + ffn.up_bias_F.double()
    gate_TF = gate_TF.to(x_TD.dtype)
    threshold = ffn.threshold if ffn.act == "fatrelu" else 0.0
    act_TF = torch.where((gate_TF >= threshold) & (gate_TF > 0), gate_TF, 0).double()
    if ffn.gate_FD is None:
        return act_TF
    up_TF = x_TD.double() @ ffn.up_FD.double().T
    return act_TF * (up_TF.relu() if ffn.act == "drelu" else up_TF)


def _down(x1_TF: Tensor, ffn: FFN, dtype: torch.dtype) -> Tensor:
    y_TD = x1_TF @ ffn.down_FD.double()
    if ffn.down_bias_D is not None:
        y_TD = y_TD + ffn.down_bias_D.double()
    return y_TD.to(dtype)


def _union(selected_TF: Tensor) -> Tensor:
    return selected_TF.any(0).sum(dtype=torch.int32)
