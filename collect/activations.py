"""The activations of ReLU-sparse models, as modules and as a rule that can be written down.

FATReLU (ProSparse, arXiv 2402.13516, section 3.3) keeps what reaches a threshold T:

    fatrelu_T(g) = g if g >= T else 0

T is rounded to the tensor's dtype first, which is what torch does with a Python scalar. ReLU is
the case of T at zero. transformers knows `relu`; importing this module teaches it `fatrelu`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN


@dataclass(frozen=True)
class ActivationRule:
    """What stands between the gate's output and x1."""

    name: str
    """`relu` or `fatrelu`."""
    threshold: float = 0.0
    """T of FATReLU; 0 for ReLU."""

    def __str__(self) -> str:
        return self.name if self.name == "relu" else f"{self.name}({self.threshold:g})"

    def module(self) -> nn.Module:
        return nn.ReLU() if self.name == "relu" else FATReLU(self.threshold)


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
                "sparsecast.collect.models.load_model, which reads hidden_act_param"
            )
        return torch.where(x >= self.threshold, x, 0)

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}"


ACT2FN["fatrelu"] = FATReLU
