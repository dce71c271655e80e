"""The activations of ReLU-sparse models, as torch modules and as a rule for manifests.

FATReLU (ProSparse, arXiv 2402.13516, section 3.3) keeps what reaches a threshold T:

    fatrelu_T(g) = g if g >= T else 0

T is rounded to the tensor's dtype first, which is what torch does with a Python scalar. ReLU is
the case of T at zero. dReLU (Bamboo, TurboSparse) is ReLU on the gate and on up. ReLU² (Primer,
arXiv 2109.08668) is relu(g)², which is zero where ReLU is. transformers knows `relu` and `relu2`;
importing this module teaches it `fatrelu` and `drelu`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN, ReLUSquaredActivation


@dataclass(frozen=True)
class ActivationRule:
    """The function between the first projections and x1."""

    name: str
    """`relu`, `fatrelu`, `drelu` or `relu2`."""
    threshold: float = 0.0
    """T of FATReLU; 0 for the others."""

    def __str__(self) -> str:
        return f"fatrelu({self.threshold:g})" if self.name == "fatrelu" else self.name

    @property
    def on_up(self) -> bool:
        """Return whether up passes through ReLU as well."""
        return self.name == "drelu"

    @property
    def squared(self) -> bool:
        """Return whether the gate is squared behind its ReLU."""
        return self.name == "relu2"

    def module(self) -> nn.Module:
        """Build the activation of the gate, or of the first projection if there is no gate."""
        if self.name == "fatrelu":
            return FATReLU(self.threshold)
        return ReLUSquaredActivation() if self.squared else nn.ReLU()


class FATReLU(nn.Module):
    """`x if x >= threshold else 0`, elementwise, any shape and float dtype.

    transformers builds activations without their parameters, so a module made by
    `AutoModelForCausalLM` has no threshold yet and refuses to run until `load_model` or
    `set_activation` gives it one: a wrong threshold would change the model without a sign.
    """

    def __init__(self, threshold: float | None = None) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        if self.threshold is None:
            raise RuntimeError(
                "this FATReLU has no threshold: load the model with "
                "sparsecast.core.models.loading.load_model, which reads hidden_act_param"
            )
        return torch.where(x >= self.threshold, x, 0)

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}"


ACT2FN["fatrelu"] = FATReLU
ACT2FN["drelu"] = nn.ReLU  # of the gate; `set_activation` adds the other
