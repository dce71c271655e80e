"""The gradients that predictors are trained by, without a chain of copies.

First that of binary cross entropy with weighted inactive entries,

    loss = -mean(y log s(z) + r (1 - y) log(1 - s(z))),    dloss/dz = (s(z) - y) (y + r (1 - y)) / n

with s the logistic function and r the layer's share of active entries; then that of a smoothed
count of wrong decisions at z = 0,

    loss = 4 mean(-y s(z) + r (1 - y) s(z))

An entry far from zero has no more weight in it, whatever its label, so that a predictor too small
for all of them can give up those it would miss anyway. By the first loss z is the logit of
p / (p + r (1 - p)) for an entry that is active with probability p: at z = 0 the odds of p are r,
which is where the second one wants the cut.

A predictor's logits are the
largest tensor of a training step by far, and a step needs the gradient alone: it takes a logistic
function, two products and a choice, where torch's own loss makes a dozen tensors of that size. On a
GPU one kernel reads the logits and the packed masks, and writes the gradient.

Shape letters: L layers, B batch, F FFN width, P packed width.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sparsecast.core.bitmask import unpack
from sparsecast.core.compiled import compile_when_large

SHOWN = 64
"""Tokens of a batch whose loss is computed, to be shown."""


def weighted_loss(
    logits_LBF: Tensor, mask_LBP: Tensor, rate_L: Tensor, *, counting: bool = False
) -> Tensor:
    """A float32 scalar whose gradient is that of the whole batch; asked for, it may take the place
    of the logits.

    Its value is the cross entropy of the first `SHOWN` tokens: a fair sample, for whoever watches.

    Args:
        mask_LBP: uint8, packed; see collect.bits.
        rate_L: Weight of a layer's inactive entries.
        counting: Take the gradient of the smoothed count.
    """
    apply: Any = _Weighted.apply
    loss: Tensor = apply(logits_LBF, mask_LBP, rate_L, counting)
    return loss


class _Weighted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_LBF: Tensor,
        mask_LBP: Tensor,
        rate_L: Tensor,
        counting: bool,
    ) -> Tensor:
        rate_L11 = rate_L[:, None, None]
        ctx.save_for_backward(logits_LBF, mask_LBP, rate_L11)
        ctx.counting = counting
        fired = unpack(mask_LBP[:, :SHOWN], logits_LBF.shape[-1])
        return nn.functional.binary_cross_entropy_with_logits(
            logits_LBF[:, :SHOWN].float(),
            fired.float(),
            weight=torch.where(fired, 1.0, rate_L11),
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None, None]:
        logits_LBF, mask_LBP, rate_L11 = ctx.saved_tensors
        scale = outer / logits_LBF.numel()
        gradient = _on_gpu if logits_LBF.is_cuda else _on_cpu
        return gradient(logits_LBF, mask_LBP, rate_L11, scale, ctx.counting), None, None, None


@compile_when_large
def _on_gpu(
    logits_LBF: Tensor, mask_LBP: Tensor, rate_L11: Tensor, scale: Tensor, counting: bool
) -> Tensor:
    neuron_F = torch.arange(logits_LBF.shape[-1], device=logits_LBF.device)
    fired_LBF = ((mask_LBP[..., neuron_F // 8] >> (neuron_F % 8)) & 1).bool()
    s = torch.sigmoid(logits_LBF.float())
    if counting:
        gradient = 4 * s * (1 - s) * torch.where(fired_LBF, -1.0, rate_L11)
    else:
        gradient = torch.where(fired_LBF, s - 1, s * rate_L11)
    return (gradient * scale).to(logits_LBF.dtype)


def _on_cpu(
    logits_LBF: Tensor, mask_LBP: Tensor, rate_L11: Tensor, scale: Tensor, counting: bool
) -> Tensor:
    """In place, layer by layer: what fits a cache is not written to memory in between, and a fresh
    tensor of the size of all logits would cost more in page faults than in arithmetic."""
    gradient_LBF = logits_LBF.detach()
    if gradient_LBF.dtype != torch.float32:
        gradient_LBF = gradient_LBF.float()
    width = logits_LBF.shape[-1]
    y_N8 = torch.empty(mask_LBP[0].numel(), 8)
    weight_N8 = torch.empty_like(y_N8)
    y_BF, weight_BF = (t.view(len(mask_LBP[0]), -1)[:, :width] for t in (y_N8, weight_N8))
    for g_BF, mask_BP, rate in zip(gradient_LBF, mask_LBP, rate_L11.flatten(), strict=True):
        torch.index_select(_bits(), 0, mask_BP.flatten().int(), out=y_N8)
        g_BF.sigmoid_()
        if counting:
            g_BF.addcmul_(g_BF, g_BF, value=-1)
            torch.mul(y_N8, -4 * scale * (1 + rate), out=weight_N8).add_(4 * scale * rate)
            g_BF.mul_(weight_BF)
        else:
            torch.mul(y_N8, scale * (1 - rate), out=weight_N8).add_(scale * rate)
            g_BF.mul_(weight_BF).sub_(y_BF.mul_(scale))
    return gradient_LBF.to(logits_LBF.dtype)


@cache
def _bits() -> Tensor:
    """(256, 8) float32: the bits of a byte, lowest first."""
    return ((torch.arange(256)[:, None] >> torch.arange(8)) & 1).float()
