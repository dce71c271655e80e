"""The loss of the default recipe, and its gradient in one pass over the logits.

Training starts with binary cross entropy, inactive entries weighted by r, the layer's share of
active entries (s is the logistic function, n the number of entries):

    loss = -mean(y log s(z) + r (1 - y) log(1 - s(z))),    dloss/dz = (s(z) - y) (y + r (1 - y)) / n

It may end with a smooth approximation of the weighted number of errors at threshold 0:

    loss = 4 mean(-y s(z) + r (1 - y) s(z))

Where a miss weighs what the neuron is worth, each y is multiplied by w, the entry's amplitude
(collect/store/energy.py) over the mean of the layer's active entries in the batch.

The gradient of the count vanishes far from zero, so a small predictor can give up entries it would
miss anyway. Both losses place the same threshold: under cross entropy, z is the logit of
p / (p + r (1 - p)) for an entry that is active with probability p, so z = 0 where the odds of p are
r. The count has its optimum at the same odds.

The logits are by far the largest tensor of a training step, and a step needs only the gradient:
one logistic function, two products and a selection, where torch's loss makes a dozen tensors of
that size. On a GPU one kernel reads the logits and the packed masks, and writes the gradient.

Shape letters: L layers, B batch, F FFN width, P packed width.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sparsecast.collect.store.energy import amplitudes
from sparsecast.core.bitmask import unpack
from sparsecast.core.compiled import compile_when_large

SHOWN = 64
"""Tokens of a batch whose loss is computed, for display."""
TINY = 1e-30
"""Floor of a sum of amplitudes: that of a layer where nothing fires is 0."""


def weighted_loss(
    logits_LBF: Tensor,
    mask_LBP: Tensor,
    rate_L: Tensor,
    value_LBF: Tensor | None = None,
    *,
    counting: bool = False,
) -> Tensor:
    """Loss of one batch: a float32 scalar with the gradient of the whole batch.

    Its value is the cross entropy of the first `SHOWN` tokens without w, for display. The backward
    pass may overwrite the logits.

    Args:
        mask_LBP: uint8, packed; see core/bitmask.py.
        rate_L: Weight of each layer's inactive entries.
        value_LBF: uint8 codes of amplitudes, which weigh active entries; unset: they weigh 1.
        counting: Use the gradient of the approximated count.
    """
    apply: Any = _Weighted.apply
    loss: Tensor = apply(logits_LBF, mask_LBP, rate_L, value_LBF, counting)
    return loss


class _Weighted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_LBF: Tensor,
        mask_LBP: Tensor,
        rate_L: Tensor,
        value_LBF: Tensor | None,
        counting: bool,
    ) -> Tensor:
        rate_L11 = rate_L[:, None, None]
        ctx.save_for_backward(logits_LBF, mask_LBP, rate_L11, value_LBF)
        ctx.counting = counting
        fired = unpack(mask_LBP[:, :SHOWN], logits_LBF.shape[-1])
        return nn.functional.binary_cross_entropy_with_logits(
            logits_LBF[:, :SHOWN].float(),
            fired.float(),
            weight=torch.where(fired, 1.0, rate_L11),
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits_LBF, mask_LBP, rate_L11, value_LBF = ctx.saved_tensors
        scale = outer / logits_LBF.numel()
        gradient = _on_gpu if logits_LBF.is_cuda else _on_cpu
        given = logits_LBF, mask_LBP, rate_L11, value_LBF, scale, ctx.counting
        return gradient(*given), None, None, None, None


@compile_when_large
def _on_gpu(
    logits_LBF: Tensor,
    mask_LBP: Tensor,
    rate_L11: Tensor,
    value_LBF: Tensor | None,
    scale: Tensor,
    counting: bool,
) -> Tensor:
    neuron_F = torch.arange(logits_LBF.shape[-1], device=logits_LBF.device)
    fired_LBF = ((mask_LBP[..., neuron_F // 8] >> (neuron_F % 8)) & 1).bool()
    s = torch.sigmoid(logits_LBF.float())
    w: Tensor | float = 1.0
    if value_LBF is not None:
        amplitude_LBF = torch.where(fired_LBF, amplitudes(value_LBF), 0.0)
        fired_L11 = fired_LBF.sum((1, 2), keepdim=True).clamp_min(1)
        w = amplitude_LBF * fired_L11 / amplitude_LBF.sum((1, 2), keepdim=True).clamp_min(TINY)
    if counting:
        gradient = 4 * s * (1 - s) * torch.where(fired_LBF, -w, rate_L11)
    else:
        gradient = torch.where(fired_LBF, w * (s - 1), s * rate_L11)
    return (gradient * scale).to(logits_LBF.dtype)


def _on_cpu(
    logits_LBF: Tensor,
    mask_LBP: Tensor,
    rate_L11: Tensor,
    value_LBF: Tensor | None,
    scale: Tensor,
    counting: bool,
) -> Tensor:
    """Compute in place and layer by layer, so that intermediate values stay in the cache; a new
    tensor of the size of all logits would cost more in page faults than in arithmetic."""
    gradient_LBF = logits_LBF.detach()
    if gradient_LBF.dtype != torch.float32:
        gradient_LBF = gradient_LBF.float()
    width = logits_LBF.shape[-1]
    y_N8 = torch.empty(mask_LBP[0].numel(), 8)
    weight_N8 = torch.empty_like(y_N8)
    y_BF, weight_BF = (t.view(len(mask_LBP[0]), -1)[:, :width] for t in (y_N8, weight_N8))
    for layer, (g_BF, mask_BP, rate) in enumerate(
        zip(gradient_LBF, mask_LBP, rate_L11.flatten(), strict=True)
    ):
        torch.index_select(_bits(), 0, mask_BP.flatten().int(), out=y_N8)
        torch.mul(y_N8, -rate, out=weight_N8).add_(rate)
        if value_LBF is not None:
            fired = y_BF.sum()
            y_BF.mul_(_amplitudes()[value_LBF[layer].int()])
            y_BF.mul_(fired / y_BF.sum().clamp_min(TINY))
        g_BF.sigmoid_()
        if counting:
            g_BF.addcmul_(g_BF, g_BF, value=-1)
            g_BF.mul_(weight_BF.sub_(y_BF).mul_(4 * scale))
        else:
            weight_BF.add_(y_BF)
            g_BF.mul_(weight_BF.mul_(scale)).sub_(y_BF.mul_(scale))
    return gradient_LBF.to(logits_LBF.dtype)


@cache
def _amplitudes() -> Tensor:
    """Amplitude of every code: (256,) float32."""
    return amplitudes(torch.arange(256))


@cache
def _bits() -> Tensor:
    """Bits of every byte, lowest first: (256, 8) float32."""
    return ((torch.arange(256)[:, None] >> torch.arange(8)) & 1).float()
