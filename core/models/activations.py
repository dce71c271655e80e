"""The activations of ReLU-sparse models, as torch modules and as a rule for manifests.

FATReLU (ProSparse, arXiv 2402.13516, section 3.3) keeps what reaches a threshold T:

    fatrelu_T(g) = g if g >= T else 0

T is rounded to the tensor's dtype first, which is what torch does with a Python scalar. ReLU is
the case of T at zero. dReLU (Bamboo, TurboSparse) is ReLU on the gate and on up. ReLU² (Primer,
arXiv 2109.08668) is relu(g)², which is zero where ReLU is. transformers knows `relu` and `relu2`;
importing this module teaches it `fatrelu` and `drelu`, as modules that refuse to run until
`load_model`, `set_activation` or integrations/transformers.py has told them the rest: transformers
builds activations from their names alone, without the config and without the FFN around them.
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

    A module made by transformers has no threshold yet and refuses to run until it is given one: a
    wrong threshold would change the model without a sign.
    """

    def __init__(self, threshold: float | None = None) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        if self.threshold is None:
            raise RuntimeError(
                "this FATReLU has no threshold: hidden_act_param in the config must be a number "
                f"from 0; {_LOAD}"
            )
        return torch.where(x >= self.threshold, x, 0)

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}"


class DReLU(nn.Module):
    """The half of dReLU that the gate passes through; any shape and float dtype.

    The other half belongs behind up, where transformers puts no activation. Until somebody has put
    it there and set `on_up`, this one refuses to run.
    """

    def __init__(self) -> None:
        super().__init__()
        self.on_up = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.on_up:
            raise RuntimeError(f"this dReLU has no ReLU behind up; {_LOAD}")
        return x.relu()


def relu_output(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
    """Forward hook of up: the other half of dReLU."""
    return output.relu()


_LOAD = (
    "import sparsecast.integrations.transformers before the model is built, or load it with "
    "sparsecast.core.models.loading.load_model"
)
ACT2FN["fatrelu"] = FATReLU
ACT2FN["drelu"] = DReLU
