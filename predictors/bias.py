"""A bias for a predictor whose format has none, so that a cut of either sign sits at threshold 0.

Two hidden units have the weights +u and -u, so relu(u x) + relu(-u x) = |u x| = b(x) >= 0, which
grows with the norm of x as the logits p do. At threshold 0

    p(x) - c b(x) >= 0   <=>   p(x) / b(x) >= c   (b > 0)

and -c goes into the two units' columns of fc2. This is exact for any u; where u x / rms(x) is
nearly constant over tokens, as the residual stream of a trained transformer allows, c is a bias.

A quantised column would round the offsets to a few codes, and they share their block's scale with
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
from sparsecast.predictors.mlp import Predictor

FINE = 8.0
"""A power of two, so that both pairs of units round alike; the lost part, at most half a step of
codes that reach 8 steps, then stays within the block's range."""


def bias_units(dtype: str) -> int:
    """Hidden units of a predictor that are its bias."""
    return 2 if dtype == "f16" else 4


@dataclass(frozen=True, eq=False)
class Uncut:
    """A predictor before its operating point is chosen: free units, an offset per neuron, and u."""

    fc1_RD: Tensor
    fc2_FR: Tensor
    offset_F: Tensor
    bias_D: Tensor
    dtype: str = "f16"

    def cut(self, c: float, near: float | None = None) -> Predictor:
        """The predictor as its file holds it, active where p / b >= c.

        Args:
            near: Take all codes of a quantised predictor from a cut here, and go from there to `c`
                by the second digit alone; a new first digit may move every code of its block.
        """
        first_F = self.offset_F - (c if near is None else near)
        fc1, fc2 = assembled(
            self.fc1_RD,
            self.fc2_FR,
            self.offset_F - c,
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
    """fc1 and fc2 with the bias units in front, rounded to a quantised `dtype`.

    f16 is left to `Predictor.stored`, but free rows of fc1 get unit norm and their scale moves into
    fc2: no logit changes, and hidden units stay within f16 for any residual stream that is.

    Args:
        first_F: What the first digit of a quantised offset stands for; the offset unless given.
        gradient: Round straight through (formats.py), as training wants it.
    """
    u_1D = bias_D.unsqueeze(-2)
    offset_F1 = offset_F.unsqueeze(-1)
    if dtype == "f16":
        norm_R = fc1_RD.norm(dim=-1).clamp_min(1e-12)
        fc1 = torch.cat([u_1D, -u_1D, fc1_RD / norm_R.unsqueeze(-1)], dim=-2)
        fc2 = torch.cat([offset_F1, offset_F1, fc2_FR * norm_R.unsqueeze(-2)], dim=-1)
        return fc1, fc2
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


def bias_of(predictor: Predictor, x_TD: Tensor) -> Tensor:
    """(T, 1) float32: b(x) of a predictor whose bias units stand in front."""
    return predictor.hidden(x_TD)[:, :2].sum(1, keepdim=True)
