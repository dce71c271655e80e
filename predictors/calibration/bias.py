"""A bias for a predictor whose format has none, so that a cut of either sign sits at threshold 0.

With b(x) > 0 a linear combination of hidden units, which grows with the norm of x as the logits p
do,

    p(x) - c b(x) >= 0   <=>   p(x) / b(x) >= c

and c times the combination is taken off every row of fc2. This is exact for any such b; where
b(x) / rms(x) is nearly constant over tokens, c is a bias.

In f16, b is the least-squares combination of the existing hidden units, which costs no rank
(`SpreadBias`). The codes of a quantized row would lose so small a change, so quantized predictors
have two extra hidden units with weights +u and -u (`BiasUnits`): relu(u x) + relu(-u x) = |u x| =
b(x), where u is the direction along which the residual stream is most nearly constant.

A quantized column would round the offsets to a few codes, and they share their block's scale with
30 other units. So q8_0 and q4_0 have a second such pair, scaled by 1 / `FINE`, whose column holds
`FINE` times what the first one lost: a second digit. Four units are the rank that it costs.

Shape letters: T tokens, D hidden, F FFN width, R free hidden units; any number of leading
dimensions may stand before them (layers).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsecast.predictors.formats import rounded, straight_through
from sparsecast.predictors.predictor import Predictor

FINE = 8.0
"""A power of two, so that both pairs of units round alike; the lost part, at most half a step of
codes that reach 8 steps, then stays within the block's range."""


def bias_units(dtype: str) -> int:
    """Hidden units that `BiasUnits` takes."""
    return 2 if dtype == "f16" else 4


@dataclass(frozen=True, eq=False)
class SpreadBias:
    """A predictor in f16 before its operating point is chosen: its weights, and the combination of
    its hidden units that is 1 on RMS-normalized inputs, as nearly as can be."""

    fc1_RD: Tensor
    fc2_FR: Tensor
    constant_R: Tensor
    dtype: str = "f16"

    def at_threshold(self, threshold: float, coarse: float | None = None) -> Predictor:
        """The predictor as its file holds it, active where p / b >= threshold."""
        return Predictor(self.fc1_RD, self.fc2_FR - threshold * self.constant_R).stored()


@dataclass(frozen=True, eq=False)
class BiasUnits:
    """A predictor before its operating point is chosen: free units, an offset per neuron, and u."""

    fc1_RD: Tensor
    fc2_FR: Tensor
    offset_F: Tensor
    bias_D: Tensor
    dtype: str = "f16"

    @property
    def constant_R(self) -> Tensor:
        """b as a combination of the hidden units of the cut predictor."""
        constant_R = torch.zeros(len(self.fc1_RD) + bias_units(self.dtype))
        constant_R[:2] = 1
        return constant_R

    def at_threshold(self, threshold: float, coarse: float | None = None) -> Predictor:
        """The predictor as its file holds it, active where p / b >= threshold.

        Args:
            coarse: Threshold for the first digit of quantized offsets; the second digit covers the
                difference to `threshold`. A new first digit may change every code of its block.
        """
        first_F = self.offset_F - (threshold if coarse is None else coarse)
        fc1, fc2 = assembled(
            self.fc1_RD,
            self.fc2_FR,
            self.offset_F - threshold,
            self.bias_D,
            self.dtype,
            first_F=first_F,
            gradient=False,
        )
        return Predictor(fc1, fc2, self.dtype).stored()


def assembled(
    fc1_RD: Tensor,
    fc2_FR: Tensor,
    offset_F: Tensor,
    bias_D: Tensor,
    dtype: str,
    *,
    first_F: Tensor | None = None,
    gradient: bool = True,
) -> tuple[Tensor, Tensor]:
    """fc1 and fc2 with the bias units in front, rounded to a quantized `dtype`.

    f16 is left to `Predictor.stored`, but free rows of fc1 get unit norm.

    Args:
        first_F: What the first digit of a quantized offset stands for; the offset unless given.
        gradient: Round straight through (formats.py), as training wants it.
    """
    u_1D = bias_D.unsqueeze(-2)
    offset_F1 = offset_F.unsqueeze(-1)
    if dtype == "f16":
        free1, free2 = unit_rows(fc1_RD, fc2_FR)
        fc1 = torch.cat([u_1D, -u_1D, free1], dim=-2)
        return fc1, torch.cat([offset_F1, offset_F1, free2], dim=-1)
    fc1 = torch.cat([u_1D, -u_1D, u_1D / FINE, -u_1D / FINE, fc1_RD], dim=-2)
    nothing_F1 = torch.zeros_like(offset_F1)
    first_F1 = offset_F1 if first_F is None else first_F.unsqueeze(-1)
    fc2 = torch.cat([first_F1, first_F1, nothing_F1, nothing_F1, fc2_FR], dim=-1)
    coarse_F1 = rounded(fc2.detach(), dtype)[..., :1]
    lost_F1 = FINE * (offset_F1.detach() - coarse_F1)
    fc2 = torch.cat([fc2[..., :2], lost_F1, lost_F1, fc2_FR], dim=-1)
    if not gradient:
        return rounded(fc1, dtype), rounded(fc2, dtype)
    return straight_through(fc1, dtype), straight_through(fc2, dtype)


def unit_rows(fc1_RD: Tensor, fc2_FR: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of fc1 with norm 1, their scale moved into fc2: no logit changes, and hidden units stay
    within f16 for any residual stream that does."""
    norm_R = fc1_RD.norm(dim=-1).clamp_min(1e-12)
    return fc1_RD / norm_R.unsqueeze(-1), fc2_FR * norm_R.unsqueeze(-2)


def bias_of(predictor: Predictor, constant_R: Tensor, x_TD: Tensor) -> Tensor:
    """(T, 1) float32: b(x), kept above zero."""
    hidden_TR = predictor.hidden(x_TD)
    return (hidden_TR @ constant_R.to(hidden_TR).unsqueeze(1)).clamp_min(1e-6)


UncalibratedPredictor = SpreadBias | BiasUnits
"""A predictor before its operating point is chosen."""
