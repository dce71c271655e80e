"""A ReLU-sparse FFN that reads only the weight rows it needs, exact or with a predictor.

    exact       gate over all neurons, then up and down where the gate fired
    predicted   gate over the predicted neurons, then up and down where it fired

An FFN of two matrices has no gate: its first projection takes the gate's place, and down follows.
With ReLU² the gate decides as with ReLU, and what it lets through is squared in float32. BitNet's
RMS norm of x1, which neurons that are silent or not predicted enter as zeros, is part of the down
projection.

Decisions are made per token. They depend on the batch size only within rounding of the threshold;
with a q8_0 or q4_0 predictor, rounding may also change an input's code by one. Weight rows are read
for the union of the tokens' neurons; a neuron adds nothing to a token that did not select it.

Both are torch operators: they run under torch.compile and inside CUDA graphs, never wait on the
host, and launch the same grids whatever is selected.

Shape letters: T tokens (1 to 16), D hidden, F FFN width, R rank of the predictor.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsecast.kernels.ops.arguments import HALVES, check_input, check_quantized, check_weight
from sparsecast.kernels.ops.bitmask import MAX_WIDTH
from sparsecast.kernels.ops.down import down
from sparsecast.kernels.ops.gate import gate
from sparsecast.kernels.ops.gate_up import DenseGate, SelectedGate, gate_up
from sparsecast.kernels.ops.launch import rounded_threshold
from sparsecast.kernels.ops.predictor import predict
from sparsecast.kernels.ops.predictor import reference as predictor_reference
from sparsecast.kernels.ops.quantized import Quantized

ACTS = ("relu", "fatrelu", "drelu", "relu2")


class FFN(NamedTuple):
    """The weights of one layer's FFN, all of one 16-bit dtype, contiguous."""

    gate_FD: Tensor | None
    """None in an FFN of two matrices."""
    up_FD: Tensor
    down_FD: Tensor
    """One row per neuron: the transpose of `nn.Linear.weight`."""
    up_bias_F: Tensor | None = None
    """Only FFNs of two matrices have biases (OPT)."""
    down_bias_D: Tensor | None = None
    x1_norm_F: Tensor | None = None
    """The weight of an RMS norm between x1 and down (BitNet); None if there is none."""
    act: str = "relu"
    """relu, fatrelu, drelu: ReLU on gate and up, or relu2: relu(gate)² (without a gate relu(up)²).
    """
    threshold: float = 0.0
    """T of FATReLU, >= 0, rounded to the weights' dtype. Other activations ignore it."""
    x1_norm_eps: float = 0.0
    """The norm's epsilon, added to the mean square."""

    @property
    def weights(self) -> tuple[Tensor | None, ...]:
        """The fields named in `WEIGHTS`."""
        return (
            self.gate_FD,
            self.up_FD,
            self.down_FD,
            self.up_bias_F,
            self.down_bias_D,
            self.x1_norm_F,
        )


WEIGHTS = FFN._fields[:6]
"""The fields of `FFN` that are tensors."""


class PredictorWeights(NamedTuple):
    """logits = fc2 @ relu(fc1 @ z); a neuron is predicted if its logit >= threshold."""

    fc1_RD: Tensor | Quantized
    """A float16 or bfloat16 tensor, which rounds its input to its own dtype (up to 65504 in
    float16), or q8_0 or q4_0, which rounds it to q8_0 as PowerInfer's engine does (up to 8.3
    million). The prediction for a larger input, or one that is not finite, is unspecified."""
    fc2_FR: Tensor | Quantized
    """A tensor if fc1_RD is one, `Quantized` if fc1_RD is."""
    threshold: float = 0.0
    input_dtype: torch.dtype | None = None
    """What float32 weights, which only plain torch takes, round their input to; int8 means q8_0."""


def exact_ffn(x_TD: Tensor, ffn: FFN) -> tuple[Tensor, Tensor]:
    """Compute the FFN without a predictor.

    Args:
        x_TD: The FFN's input (after the norm), 1 to 16 tokens, in the weights' dtype.

    Returns:
        y_TD in the input's dtype, and the number of neurons that fired for any token (int32 on the
        device).

    Raises:
        ValueError: Shapes, dtypes or devices do not match.
    """
    _check(x_TD, ffn)
    result: tuple[Tensor, Tensor] = _exact(
        x_TD.contiguous(), *ffn.weights, ffn.act, _threshold(ffn), ffn.x1_norm_eps
    )
    return result


def predicted_ffn(
    x_TD: Tensor, z_TD: Tensor, ffn: FFN, predictor: PredictorWeights
) -> tuple[Tensor, Tensor]:
    """Compute the FFN for the predicted neurons only.

    Args:
        x_TD: The FFN's input (after the norm), 1 to 16 tokens, in the weights' dtype.
        z_TD: The predictor's input, in any float dtype. PowerInfer takes the residual before the
            FFN's norm.

    Returns:
        y_TD in the input's dtype, and the number of neurons predicted for any token (int32 on the
        device).

    Raises:
        ValueError: Shapes, dtypes or devices do not match.
    """
    _check(x_TD, ffn)
    _check_predictor(x_TD, z_TD, ffn, predictor)
    result: tuple[Tensor, Tensor] = _predicted(
        x_TD.contiguous(), z_TD.contiguous(), *ffn.weights, ffn.act, _threshold(ffn),
        ffn.x1_norm_eps, *_code_and_scale(predictor.fc1_RD), *_code_and_scale(predictor.fc2_FR),
        predictor.threshold,
    )  # fmt: skip
    return result


@torch.library.custom_op("sparsecast::exact_ffn", mutates_args=())
def _exact(
    x: torch.Tensor,
    gate_weight: torch.Tensor | None,
    up: torch.Tensor,
    down_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    x1_norm: torch.Tensor | None,
    act: str,
    threshold: float,
    x1_norm_eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    first, up_FD = (up, None) if gate_weight is None else (gate_weight, up)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        act_FT, fired = gate(x, first, up_bias, threshold)
        active = gate_up(x, fired, DenseGate(act_FT), up_FD, **_after(act))
        return down(active, down_weight, down_bias, x1_norm, x1_norm_eps), active.total


@torch.library.custom_op("sparsecast::predicted_ffn", mutates_args=())
def _predicted(
    x: torch.Tensor,
    z: torch.Tensor,
    gate_weight: torch.Tensor | None,
    up: torch.Tensor,
    down_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    x1_norm: torch.Tensor | None,
    act: str,
    threshold: float,
    x1_norm_eps: float,
    fc1: torch.Tensor,
    fc1_scale: torch.Tensor | None,
    fc2: torch.Tensor,
    fc2_scale: torch.Tensor | None,
    predictor_threshold: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    fc1_RD = fc1 if fc1_scale is None else Quantized(fc1, fc1_scale)
    fc2_FR = fc2 if fc2_scale is None else Quantized(fc2, fc2_scale)
    first, up_FD = (up, None) if gate_weight is None else (gate_weight, up)
    with torch.cuda.device_of(x):
        predicted, chosen_F = predict(z, fc1_RD, fc2_FR, predictor_threshold)
        selected_gate = SelectedGate(first, up_bias, threshold, chosen_F)
        active = gate_up(x, predicted, selected_gate, up_FD, **_after(act))
        return down(active, down_weight, down_bias, x1_norm, x1_norm_eps), active.total


def _after(act: str) -> dict[str, bool]:
    """What `gate_up` does with gates that have passed their ReLU, and with up."""
    return {"relu_up": act == "drelu", "squared": act == "relu2"}


def _shapes(x: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), torch.empty((), dtype=torch.int32, device=x.device)


_exact.register_fake(_shapes)
_predicted.register_fake(_shapes)


def exact_reference(x_TD: Tensor, ffn: FFN) -> tuple[Tensor, Tensor]:
    """Compute `exact_ffn` in plain torch, with sums in float64."""
    act_TF, x1_TF = _x1(x_TD, ffn)
    return _down(x1_TF, ffn, x_TD.dtype), _union(act_TF != 0)


def predicted_reference(
    x_TD: Tensor, z_TD: Tensor, ffn: FFN, predictor: PredictorWeights
) -> tuple[Tensor, Tensor]:
    """Compute `predicted_ffn` in plain torch, with sums in float64."""
    fc1_RD, fc2_FR, _, dtype = predictor
    _, logits_TF = predictor_reference(z_TD, fc1_RD, fc2_FR, dtype)
    predicted_TF = logits_TF >= predictor.threshold
    _, x1_TF = _x1(x_TD, ffn)
    return _down(x1_TF * predicted_TF, ffn, x_TD.dtype), _union(predicted_TF)


def _x1(x_TD: Tensor, ffn: FFN) -> tuple[Tensor, Tensor]:
    """Compute the activation, which is decided in the gate's dtype, and the inputs of the down
    projection; both (T, F) float64."""
    first = ffn.up_FD if ffn.gate_FD is None else ffn.gate_FD
    gate_TF = x_TD.double() @ first.double().T
    if ffn.up_bias_F is not None:
        gate_TF = gate_TF + ffn.up_bias_F.double()
    gate_TF = gate_TF.to(x_TD.dtype)
    act_TF = torch.where((gate_TF < _threshold(ffn)) | (gate_TF <= 0), 0, gate_TF).double()
    x1_TF = act_TF.square() if ffn.act == "relu2" else act_TF
    if ffn.gate_FD is None:
        return act_TF, x1_TF
    up_TF = x_TD.double() @ ffn.up_FD.double().T
    return act_TF, x1_TF * (up_TF.relu() if ffn.act == "drelu" else up_TF)


def _down(x1_TF: Tensor, ffn: FFN, dtype: torch.dtype) -> Tensor:
    if ffn.x1_norm_F is not None:
        mean_T1 = x1_TF.square().mean(1, keepdim=True)
        x1_TF = x1_TF * (mean_T1 + ffn.x1_norm_eps).rsqrt() * ffn.x1_norm_F.double()
    y_TD = x1_TF @ ffn.down_FD.double()
    if ffn.down_bias_D is not None:
        y_TD = y_TD + ffn.down_bias_D.double()
    return y_TD.to(dtype)


def _union(selected_TF: Tensor) -> Tensor:
    return selected_TF.any(0).sum(dtype=torch.int32)


def _threshold(ffn: FFN) -> float:
    return rounded_threshold(ffn.threshold, ffn.up_FD.dtype) if ffn.act == "fatrelu" else 0.0


def _code_and_scale(weight: Tensor | Quantized) -> tuple[Tensor, Tensor | None]:
    return (weight, None) if isinstance(weight, Tensor) else (weight.code_NC, weight.scale_NB)


def _check(x_TD: Tensor, ffn: FFN) -> None:
    if ffn.act not in ACTS:
        raise ValueError(f"act: got {ffn.act!r}, expected one of {', '.join(ACTS)}")
    if not ffn.threshold >= 0:
        raise ValueError(f"threshold: got {ffn.threshold}, expected a number >= 0")
    if not ffn.x1_norm_eps >= 0:
        raise ValueError(f"x1_norm_eps: got {ffn.x1_norm_eps}, expected a number >= 0")
    if ffn.gate_FD is None and ffn.act == "drelu":
        raise ValueError("act: drelu is ReLU on gate and up, but gate_FD is None; use relu")
    if ffn.gate_FD is not None and (ffn.up_bias_F is not None or ffn.down_bias_D is not None):
        raise ValueError(
            "up_bias_F, down_bias_D: expected None in an FFN with a gate; only an FFN of two "
            "matrices has biases"
        )
    f, d = ffn.up_FD.shape
    if f > MAX_WIDTH:
        raise ValueError(f"up_FD: has {f} neurons, expected at most {MAX_WIDTH}; use the dense FFN")
    check_input(x_TD, d)
    shapes = ((f, d), (f, d), (f, d), (f,), (d,), (f,))
    for name, weight, shape in zip(WEIGHTS, ffn.weights, shapes, strict=True):
        if weight is not None:
            check_weight(name, weight, shape, (x_TD.dtype,), x_TD.device)


def _check_predictor(x_TD: Tensor, z_TD: Tensor, ffn: FFN, predictor: PredictorWeights) -> None:
    if z_TD.shape != x_TD.shape or z_TD.device != x_TD.device:
        raise ValueError(
            f"z: {tuple(z_TD.shape)} on {z_TD.device}, but x is {tuple(x_TD.shape)} on "
            f"{x_TD.device}; give the same tokens' residual"
        )
    if isinstance(predictor.fc1_RD, Tensor) != isinstance(predictor.fc2_FR, Tensor):
        raise ValueError(
            "fc1_RD, fc2_FR: one is a tensor and one Quantized, expected the same kind; quantize "
            "both or neither"
        )
    (f, d), rank = ffn.up_FD.shape, predictor.fc1_RD.shape[0]
    shapes = ((rank, d), (f, rank))
    for name, weight, shape in zip(predictor._fields[:2], predictor[:2], shapes, strict=True):
        if isinstance(weight, Tensor):
            check_weight(name, weight, shape, HALVES, x_TD.device)
        else:
            check_quantized(name, weight, shape, x_TD.device)
