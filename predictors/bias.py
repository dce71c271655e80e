"""A bias for a predictor whose format has none, so that a cut of either sign sits at threshold 0.

Two hidden units have the weights +u and -u, so relu(u x) + relu(-u x) = |u x| = b(x) >= 0, which
grows with the norm of x as the logits p do. At threshold 0

    p(x) - c b(x) >= 0   <=>   p(x) / b(x) >= c   (b > 0)

and -c goes into the two units' columns of fc2. This is exact for any u; where u x / rms(x) is
nearly constant over tokens, as the residual stream of a trained transformer allows, c is a bias.

Shape letters: T tokens, D hidden, F FFN width, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecast.predictors.mlp import Predictor

BIAS_UNITS = 2


def fold(fc1_RD: Tensor, fc2_FR: Tensor, offset_F: Tensor, bias_D: Tensor) -> Predictor:
    """One predictor with the bias units in front: logits = p, the bias direction as two units.

    Rows of fc1 are scaled to unit norm and their scale moved into fc2, which changes no logit and
    keeps the hidden units within f16 for any residual stream that is.
    """
    fc1 = torch.cat([bias_D[None], -bias_D[None], fc1_RD])
    fc2 = torch.cat([offset_F[:, None], offset_F[:, None], fc2_FR], dim=1)
    norm = fc1.norm(dim=1).clamp_min(1e-12)
    return Predictor(fc1 / norm[:, None], fc2 * norm[None])


def shift(predictor: Predictor, cut: float) -> Predictor:
    """Move the cut of a folded predictor to logit 0: p - cut * b, with b as `bias_of` gives it."""
    fc2 = predictor.fc2_FR.clone()
    fc2[:, :BIAS_UNITS] -= cut
    return Predictor(predictor.fc1_RD, fc2)


def bias_of(predictor: Predictor, x_TD: Tensor) -> Tensor:
    """(T, 1): what the bias units of a folded predictor sum to, in float32."""
    return (x_TD.float() @ predictor.fc1_RD[:1].float().T).abs()
