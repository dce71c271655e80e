"""PowerInfer's predictor: logits = fc2 @ relu(fc1 @ x), no bias, active where logit >= threshold.

The map is positively homogeneous, p(c x) = c p(x) for c > 0, so at threshold 0 decisions do not
depend on the norm of x: a predictor trained on RMS-normalized inputs decides the same on the raw
residual stream.

Shape letters: T tokens, D hidden, F FFN width, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsecast.predictors.formats import BITS, rounded, rounded_input


@dataclass(frozen=True, eq=False)
class Predictor:
    """One layer's weights, laid out as in `nn.Linear`, and their stored format.

    Quantized weights are kept as the float32 values that the format holds.
    """

    fc1_RD: Tensor
    fc2_FR: Tensor
    dtype: str = "f16"

    @property
    def rank(self) -> int:
        return self.fc1_RD.shape[0]

    @property
    def weights(self) -> tuple[Tensor, Tensor]:
        return self.fc1_RD, self.fc2_FR

    @property
    def nbytes(self) -> int:
        """Size of both matrices in PowerInfer's file."""
        return int(sum(weight.numel() for weight in self.weights) * BITS[self.dtype] / 8)

    def stored(self, dtype: str | None = None) -> Predictor:
        """Round to the values that a file in this format holds; its own format unless given."""
        dtype = dtype or self.dtype
        kept = torch.float16 if dtype == "f16" else torch.float32
        if dtype == "f16" and all(weight.dtype == kept for weight in self.weights):
            return Predictor(*self.weights)
        fc1_RD, fc2_FR = (rounded(weight, dtype).to(kept) for weight in self.weights)
        return Predictor(fc1_RD, fc2_FR, dtype)

    def to(self, device: torch.device) -> Predictor:
        return Predictor(self.fc1_RD.to(device), self.fc2_FR.to(device), self.dtype)

    def logits(self, x_TD: Tensor) -> Tensor:
        """Logits (T, F) float32 for raw inputs of any float dtype, rounded as in the engine: the
        input of each product by `rounded_input`, sums in float32."""
        hidden_TR = self.hidden(x_TD)
        return rounded_input(hidden_TR, self.dtype) @ self.fc2_FR.float().T

    def hidden(self, x_TD: Tensor) -> Tensor:
        """Hidden units (T, R) float32, before they are rounded for the second product."""
        return (rounded_input(x_TD, self.dtype) @ self.fc1_RD.float().T).relu()


def rms(x_TD: Tensor) -> Tensor:
    """Root mean square of each token's vector: (T, 1) float32."""
    return x_TD.float().square().mean(-1, keepdim=True).clamp_min(1e-12).sqrt()


def rms_normalized(x_TD: Tensor) -> Tensor:
    """x / rms(x) in float32, the inputs that predictors are trained on."""
    return x_TD.float() / rms(x_TD)
