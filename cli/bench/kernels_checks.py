"""Check each kernel of a benchmark against its reference in float64, before it is timed.

A reference gets the kernel's own decisions, except for the predictor, whose decisions are compared
one by one.

Shape letters: T tokens, D hidden, F FFN width, K neurons of a set.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsecast.kernels.ops import active_list, bitmask, down, gate, gate_up, predictor
from sparsecast.kernels.ops.ffn import FFN, PredictorWeights

LIMITS = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Largest max |out - ref| / max |ref| in float64, by dtype."""
LOGIT_LIMIT = 2e-2
"""Largest distance from the threshold at which a decision may differ, for logits of order 4: hidden
units are rounded to 16 bits or to q8_0."""


class Case(NamedTuple):
    """One benchmarked FFN: its shape, sparsity and batch."""

    name: str
    d: int
    f: int
    matrices: int
    rank: int
    sparsity: float
    tokens: int
    dtype: torch.dtype
    device: torch.device
    act: str = "relu"
    x1_norm: bool = False


def projections(weights: FFN) -> tuple[Tensor, Tensor | None]:
    """The projection that decides which neurons fire, and the second one if there is a gate."""
    return (weights.up_FD, None) if weights.gate_FD is None else (weights.gate_FD, weights.up_FD)


def check_gate(case: Case, x_TD: Tensor, gate_FD: Tensor, act_FT: Tensor) -> None:
    """Compare the gate's activations."""
    want_FT, _ = gate.reference(x_TD, gate_FD, None, 0.0)
    _check(case, "gate", act_FT, want_FT.double())


def check_predictor(case: Case, z_TD: Tensor, weights: PredictorWeights) -> None:
    """Compare decisions at three thresholds.

    Hardly a logit is near the predictor's own threshold, so two quantiles of the logits are tried
    too.
    """
    _, logits_TF = predictor.reference(z_TD, weights.fc1_RD, weights.fc2_FR)
    token = torch.arange(case.tokens, device=case.device)
    middle = logits_TF.flatten()[:100_000].quantile(
        torch.tensor([0.4, 0.9], dtype=torch.float64, device=case.device)
    )
    for threshold in (weights.threshold, *middle.tolist()):
        _, chosen_F = predictor.predict(z_TD, weights.fc1_RD, weights.fc2_FR, threshold)
        got_TF = ((chosen_F >> token[:, None]) & 1).bool()
        wrong = logits_TF[got_TF != (logits_TF >= threshold)] - threshold
        if wrong.numel() and float(wrong.abs().max()) > LOGIT_LIMIT:
            raise RuntimeError(
                f"{case.name}, {case.tokens} tokens: the predictor decides unlike its reference "
                f"for {wrong.numel()} of {logits_TF.numel()} entries, up to "
                f"{float(wrong.abs().max()):.2g} from the threshold {threshold:.2g}, expected "
                f"at most {LOGIT_LIMIT:g}"
            )


def check_rows(
    case: Case,
    x_TD: Tensor,
    mask_W: Tensor,
    source: gate_up.DenseGate | gate_up.SelectedGate,
    weights: FFN,
    got: active_list.ActiveList,
) -> None:
    """Compare the selected rows, and x1 of each."""
    on_F = bitmask.reference(mask_W, case.f)
    squared = weights.act == "relu2"
    row_K, x1_KT = gate_up.reference(x_TD, on_F, source, projections(weights)[1], False, squared)
    got_K, got_KT = active_list.unpacked(got)
    if not torch.equal(got_K, row_K.int()):
        raise RuntimeError(f"{case.name}: the listed rows are not the selected ones")
    _check(case, "up", got_KT, x1_KT)


def check_down(case: Case, weights: FFN, chosen: active_list.ActiveList, whole_TD: Tensor) -> None:
    """Compare the down projection, and the output of the whole FFN."""
    given = (chosen, weights.down_FD, None, weights.x1_norm_F, weights.x1_norm_eps)
    want_TD = down.reference(*given)
    _check(case, "down", down.down(*given), want_TD)
    _check(case, "whole FFN", whole_TD, want_TD)


def _check(case: Case, step: str, got: Tensor, want: Tensor) -> None:
    scale = want.abs().max().clamp_min(1e-30)
    error = float((got.double() - want).abs().max() / scale)
    if not error <= LIMITS[case.dtype]:
        raise RuntimeError(
            f"{case.name}, {case.tokens} tokens: {step} is off its reference by {error:.2g} of "
            f"the largest value, expected at most {LIMITS[case.dtype]:.2g}"
        )
