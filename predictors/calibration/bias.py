"""Fold a threshold into weights that have no bias, so that every predictor decides at 0.

Let b(x) > 0 be a linear combination of the hidden units; like the logits p, it grows with the norm
of x. Then

    p(x) - c b(x) >= 0   <=>   p(x) / b(x) >= c

so subtracting c times the combination from every row of fc2 moves threshold c, of either sign, to
0. This is exact for any such b. If b(x) / rms(x) is nearly constant over tokens, c acts as a bias.

In f16, b is the least-squares combination of the existing hidden units, which costs no rank
(`SpreadBias`). The codes of a quantized row would lose so small a change, so quantized predictors
have two extra hidden units with weights +u and -u (`BiasUnits`): relu(u x) + relu(-u x) = |u x| =
b(x), where u is the direction along which the residual stream is most nearly constant.

Offsets in a quantized column share their block's scale with 30 other units and would be rounded to
a few codes. So q8_0 and q4_0 have a second such pair, scaled by 1 / `FINE`, whose column holds
`FINE` times the rounding error of the first: a second digit. This costs four units of rank.

Hidden units are nowhere near 0 on average, so the rounding errors of all weights together move a
neuron's logit by much the same for every token. The offset takes that back: it gets what rounding
has changed at the mean input, over b. (Bias correction of Nagel et al., arXiv 1906.04721, section
4.2, with one mean input for all neurons.)

Shape letters: T tokens, D hidden, F FFN width, R free hidden units; leading dimensions such as
layers are allowed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsecast.core.ggml_blocks import BLOCK
from sparsecast.predictors.formats import rounded, straight_through
from sparsecast.predictors.predictor import Predictor

FINE = 8.0
"""A power of two, so that both pairs of units round alike. The error is at most half a step, and
codes reach 8 steps, so `FINE` times the error stays within the block's range."""


def bias_units(dtype: str) -> int:
    """Hidden units that `BiasUnits` reserves."""
    return 2 if dtype == "f16" else 4


@dataclass(frozen=True, eq=False)
class SpreadBias:
    """An uncalibrated f16 predictor with the combination of its hidden units that is nearest to 1
    on RMS-normalized inputs."""

    fc1_RD: Tensor
    fc2_FR: Tensor
    constant_R: Tensor
    dtype: str = "f16"

    def to(self, device: torch.device) -> SpreadBias:
        return SpreadBias(
            self.fc1_RD.to(device), self.fc2_FR.to(device), self.constant_R.to(device)
        )

    def at_threshold(self, threshold: float, coarse: float | None = None) -> Predictor:
        """The predictor as its file holds it, active where p / b >= threshold."""
        return Predictor(self.fc1_RD, self.fc2_FR - threshold * self.constant_R).stored()


@dataclass(frozen=True, eq=False)
class BiasUnits:
    """An uncalibrated predictor with bias units: free units, an offset per neuron, and u."""

    fc1_RD: Tensor
    fc2_FR: Tensor
    offset_F: Tensor
    bias_D: Tensor
    mean_D: Tensor
    """The mean RMS-normalized input."""
    dtype: str = "f16"

    def to(self, device: torch.device) -> BiasUnits:
        return BiasUnits(
            self.fc1_RD.to(device),
            self.fc2_FR.to(device),
            self.offset_F.to(device),
            self.bias_D.to(device),
            self.mean_D.to(device),
            self.dtype,
        )

    @property
    def constant_R(self) -> Tensor:
        """b as a combination of the stored predictor's hidden units."""
        units = len(self.fc1_RD) + bias_units(self.dtype)
        constant_R = torch.zeros(units, device=self.fc1_RD.device)
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
            self.mean_D,
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
    mean_D: Tensor,
    dtype: str,
    *,
    first_F: Tensor | None = None,
    gradient: bool = True,
) -> tuple[Tensor, Tensor]:
    """Assemble fc1 and fc2 with the bias units first, rounded to a quantized `dtype`.

    In f16, rows of fc1 get unit norm, and rounding is left to `Predictor.stored`.

    Args:
        mean_D: The mean RMS-normalized input, at which rounding shall not change the logits.
        first_F: Value for the first digit of a quantized offset; the offset unless given.
        gradient: Round with straight-through gradients (predictors/formats.py), for training.
    """
    u_1D = bias_D.unsqueeze(-2)
    offset_F1 = offset_F.unsqueeze(-1)
    if dtype == "f16":
        free1, free2 = unit_rows(fc1_RD, fc2_FR)
        fc1 = torch.cat([u_1D, -u_1D, free1], dim=-2)
        return fc1, torch.cat([offset_F1, offset_F1, free2], dim=-1)
    round_to = straight_through if gradient else rounded
    fc1 = round_to(torch.cat([u_1D, -u_1D, u_1D / FINE, -u_1D / FINE, fc1_RD], dim=-2), dtype)
    # The offsets share block 0 with the first free units; the other blocks do not depend on them.
    units = bias_units(dtype)
    beside = BLOCK - units
    rest = round_to(fc2_FR[..., beside:], dtype)
    # bfloat16 would round away the difference that is taken here.
    with torch.no_grad(), torch.autocast(fc2_FR.device.type, enabled=False):
        hidden_R1 = (fc1 @ mean_D.unsqueeze(-1)).relu()
        b = hidden_R1[..., :2, :].sum(-2, keepdim=True).clamp_min(1e-6)
        whole_F1 = fc2_FR @ (fc1_RD @ mean_D.unsqueeze(-1)).relu()
        missing_F1 = whole_F1 - rest @ hidden_R1[..., BLOCK:, :]

        def block_and_shift(first_F1: Tensor, fine_F1: Tensor) -> tuple[Tensor, Tensor]:
            parts = [first_F1, first_F1, fine_F1, fine_F1, fc2_FR[..., :beside]]
            block = rounded(torch.cat(parts, dim=-1), dtype)
            return block, (missing_F1 - block[..., units:] @ hidden_R1[..., units:BLOCK, :]) / b

        fine_F1 = torch.zeros_like(offset_F1)
        first_F1 = offset_F1 if first_F is None else first_F.unsqueeze(-1)
        first_F1 = first_F1 + block_and_shift(first_F1, fine_F1)[1]
        for _ in range(2):  # the second digit may give the block another scale
            block, shift_F1 = block_and_shift(first_F1, fine_F1)
            fine_F1 = FINE * (offset_F1 + shift_F1 - block[..., :1])
        moved_F1 = first_F1 - offset_F1
    first_F1 = offset_F1 + moved_F1
    block_0 = torch.cat([first_F1, first_F1, fine_F1, fine_F1, fc2_FR[..., :beside]], dim=-1)
    return fc1, torch.cat([round_to(block_0, dtype), rest], dim=-1)


def unit_rows(fc1_RD: Tensor, fc2_FR: Tensor) -> tuple[Tensor, Tensor]:
    """Scale rows of fc1 to norm 1 and move their scale into fc2.

    Logits stay the same, and hidden units fit f16 for any input that does.
    """
    norm_R = fc1_RD.norm(dim=-1).clamp_min(1e-12)
    return fc1_RD / norm_R.unsqueeze(-1), fc2_FR * norm_R.unsqueeze(-2)


def bias_of(predictor: Predictor, constant_R: Tensor, x_TD: Tensor) -> Tensor:
    """b(x), kept above zero: (T, 1) float32."""
    hidden_TR = predictor.hidden(x_TD)
    return (hidden_TR @ constant_R.to(hidden_TR).unsqueeze(1)).clamp_min(1e-6)


UncalibratedPredictor = SpreadBias | BiasUnits
"""A predictor before its operating point is chosen."""
