"""PowerInfer's predictor: logits = fc2 @ relu(fc1 @ x), no bias, active where logit >= threshold.

The map is positively homogeneous, p(c x) = c p(x) for c > 0, so at threshold 0 the decision does
not depend on the norm of x: a predictor trained on RMS-normalised inputs decides the same on the
raw residual stream.

Shape letters: T tokens, D hidden, F FFN width, R rank.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Predictor(NamedTuple):
    """The weights of one layer's predictor, as `nn.Linear` keeps them."""

    fc1_RD: Tensor
    fc2_FR: Tensor

    @property
    def rank(self) -> int:
        return self.fc1_RD.shape[0]

    def logits(self, x_TD: Tensor) -> Tensor:
        """(T, F) float32 logits for raw inputs of any float dtype, rounded as the engine rounds.

        PowerInfer's CPU kernels convert the input and the hidden units to f16 before each product
        with f16 weights and sum in float32.
        """
        hidden_TR = (x_TD.half().float() @ self.fc1_RD.float().T).relu()
        return hidden_TR.half().float() @ self.fc2_FR.float().T


def rms(x_TD: Tensor) -> Tensor:
    """(T, 1) float32: the root mean square of every token's vector."""
    return x_TD.float().square().mean(-1, keepdim=True).clamp_min(1e-12).sqrt()


def rms_normalised(x_TD: Tensor) -> Tensor:
    """x / rms(x) in float32: the scale-free inputs that predictors are trained on."""
    return x_TD.float() / rms(x_TD)
