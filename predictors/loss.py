"""Binary cross entropy with weighted inactive entries, and its gradient without a chain of copies.

    loss = -mean(y log s(z) + r (1 - y) log(1 - s(z))),    dloss/dz = (s(z) - y) (y + r (1 - y)) / n

with s the logistic function and r the layer's share of active entries. A predictor's logits are the
largest tensor of a training step by far, and a step needs the gradient alone: it takes a logistic
function, two products and a choice, where torch's own loss makes a dozen tensors of that size.

Shape letters: L layers, B batch, F FFN width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

SHOWN = 64
"""Tokens of a batch whose loss is computed, to be shown."""


def weighted_bce(logits_LBF: Tensor, fired_LBF: Tensor, rate_L: Tensor) -> Tensor:
    """The loss, a float32 scalar whose gradient is that of the whole batch.

    Its value is the loss of the first `SHOWN` tokens: a fair sample, for whoever watches.

    Args:
        fired_LBF: Bool.
        rate_L: Weight of a layer's inactive entries.
    """
    apply: Any = _WeightedBCE.apply
    loss: Tensor = apply(logits_LBF, fired_LBF, rate_L)
    return loss


class _WeightedBCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_LBF: Tensor, fired_LBF: Tensor, rate_L: Tensor) -> Tensor:
        rate_L11 = rate_L[:, None, None]
        gradient = torch.sigmoid(logits_LBF.float())
        inactive = gradient * rate_L11
        torch.where(fired_LBF, gradient.sub_(1), inactive, out=gradient)
        ctx.gradient, ctx.dtype = gradient, logits_LBF.dtype
        fired = fired_LBF[:, :SHOWN]
        return nn.functional.binary_cross_entropy_with_logits(
            logits_LBF[:, :SHOWN].float(),
            fired.float(),
            weight=torch.where(fired, 1.0, rate_L11),
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None]:
        gradient, ctx.gradient = ctx.gradient, None  # scaled in place, so it serves once
        return gradient.mul_(outer / gradient.numel()).to(ctx.dtype), None, None
