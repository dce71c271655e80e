"""Binary cross entropy with weighted inactive entries, and its gradient without a chain of copies.

    loss = -mean(y log s(z) + r (1 - y) log(1 - s(z))),    dloss/dz = (s(z) - y) (y + r (1 - y)) / n

with s the logistic function and r the layer's share of active entries. A predictor's logits are the
largest tensor of a training step by far, and a step needs the gradient alone: it takes a logistic
function, two products and a choice, where torch's own loss makes a dozen tensors of that size. On a
GPU one kernel reads the logits and the packed masks, and writes the gradient.

Shape letters: L layers, B batch, F FFN width, P packed width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sparsecast.collect.bits import unpack
from sparsecast.predictors.fused import fused

SHOWN = 64
"""Tokens of a batch whose loss is computed, to be shown."""


def weighted_bce(logits_LBF: Tensor, mask_LBP: Tensor, rate_L: Tensor) -> Tensor:
    """The loss, a float32 scalar whose gradient is that of the whole batch.

    Its value is the loss of the first `SHOWN` tokens: a fair sample, for whoever watches.

    Args:
        mask_LBP: uint8, packed; see collect.bits.
        rate_L: Weight of a layer's inactive entries.
    """
    apply: Any = _WeightedBCE.apply
    loss: Tensor = apply(logits_LBF, mask_LBP, rate_L)
    return loss


class _WeightedBCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_LBF: Tensor, mask_LBP: Tensor, rate_L: Tensor) -> Tensor:
        rate_L11 = rate_L[:, None, None]
        ctx.save_for_backward(logits_LBF, mask_LBP, rate_L11)
        fired = unpack(mask_LBP[:, :SHOWN], logits_LBF.shape[-1])
        return nn.functional.binary_cross_entropy_with_logits(
            logits_LBF[:, :SHOWN].float(),
            fired.float(),
            weight=torch.where(fired, 1.0, rate_L11),
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None]:
        logits_LBF, mask_LBP, rate_L11 = ctx.saved_tensors
        scale = outer / logits_LBF.numel()
        if logits_LBF.is_cuda:
            return _gradient(logits_LBF, mask_LBP, rate_L11, scale), None, None
        gradient = torch.sigmoid(logits_LBF.float())
        inactive = gradient * rate_L11
        fired_LBF = unpack(mask_LBP, logits_LBF.shape[-1])
        torch.where(fired_LBF, gradient.sub_(1), inactive, out=gradient)
        return gradient.mul_(scale).to(logits_LBF.dtype), None, None


@fused
def _gradient(logits_LBF: Tensor, mask_LBP: Tensor, rate_L11: Tensor, scale: Tensor) -> Tensor:
    neuron_F = torch.arange(logits_LBF.shape[-1], device=logits_LBF.device)
    fired_LBF = ((mask_LBP[..., neuron_F // 8] >> (neuron_F % 8)) & 1).bool()
    s = torch.sigmoid(logits_LBF.float())
    gradient = torch.where(fired_LBF, s - 1, s * rate_L11) * scale
    return gradient.to(logits_LBF.dtype)
