"""Cross entropy from hidden states, a few tokens at a time, so that no more logits exist at once.

    nll = sum over tokens of logsumexp(z) - z[target],    z = cap tanh(W h / (scale cap))

Without a cap (Gemma's and nanochat's `final_logit_softcapping`) z is W h / scale, and `scale` is 1
but for Granite's `logits_scaling`. The gradient of a chunk is computed with its loss:

    g = (softmax(z) - onehot(target)) (1 - (z / cap)^2) / scale,    dh = W^T g,    dW = g h^T

So three products of the head are computed, as in plain training, and
what is kept for the backward pass is as large as h and W.

Shape letters: N tokens, D hidden, V vocabulary; B batch, S sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsecast.core.compiled import compile_when_large

IGNORED = -100
"""The target of a token that has no loss."""
CHUNK_LOGITS = 1 << 26
"""Logits in memory at once: 256 MB in float32, with copies of the same size for the gradient."""


@dataclass(frozen=True)
class Head:
    """What turns hidden states into logits."""

    weight_VD: Tensor
    scale: float
    """Divisor of the logits."""
    cap: float | None
    """Bound of their tanh; None without one."""


def head_of(model: PreTrainedModel) -> Head:
    """Return the output head of a causal LM of any supported family."""
    known: Any = model
    head, config = known.get_output_embeddings(), known.config
    assert isinstance(head, nn.Linear)
    assert head.bias is None
    cap = getattr(config, "final_logit_softcapping", None)
    return Head(head.weight, float(getattr(config, "logits_scaling", 1.0)), cap)


def summed_nll(hidden_BSD: Tensor, head: Head, target_BS: Tensor) -> Tensor:
    """Compute the sum of the tokens' negative log-likelihoods, as one number.

    Equals `cross_entropy(logits.flatten(0, 1).float(), target_BS.flatten(), reduction="sum")`.
    Products are in the dtype of autocast, or else of the weight; the softmax is in float32, or in
    float64 for float64.

    Args:
        hidden_BSD: What the head reads: the base model's last hidden state.
        target_BS: int64; `IGNORED` where a token has no loss.
    """
    kind = hidden_BSD.device.type
    dtype = head.weight_VD.dtype
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    total: Tensor = _SummedNLL.apply(  # type: ignore[no-untyped-call]
        hidden_BSD.flatten(0, 1), head.weight_VD, target_BS.flatten(), head.scale, head.cap, dtype
    )
    return total


class _SummedNLL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        target_N: Tensor,
        scale: float,
        cap: float | None,
        dtype: torch.dtype,
    ) -> Tensor:
        rows = max(1, CHUNK_LOGITS // len(weight_VD))
        with torch.autocast(hidden_ND.device.type, enabled=False):
            w_VD = weight_VD.to(dtype)
            grad_VD = torch.zeros_like(weight_VD)
            grads_ND, losses = [], []
            for start in range(0, len(hidden_ND), rows):
                h_ND = hidden_ND[start : start + rows].to(dtype)
                loss, dl_NV = _loss_and_gradient(
                    h_ND @ w_VD.T, target_N[start : start + rows], scale, cap
                )
                losses.append(loss)
                grads_ND.append((dl_NV @ w_VD).to(hidden_ND.dtype))
                grad_VD += dl_NV.T @ h_ND
            ctx.save_for_backward(torch.cat(grads_ND), grad_VD)
            return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        grad_ND, grad_VD = ctx.saved_tensors
        return grad_ND * outer[0], grad_VD * outer[0], None, None, None, None


@compile_when_large
def _loss_and_gradient(
    l_NV: Tensor, target_N: Tensor, scale: float, cap: float | None
) -> tuple[Tensor, Tensor]:
    """Return the summed loss of raw logits, and its gradient with respect to them."""
    z_NV = l_NV.to(torch.promote_types(l_NV.dtype, torch.float32))
    if scale != 1:
        z_NV = z_NV / scale
    if cap is not None:
        z_NV = cap * torch.tanh(z_NV / cap)
    log_p_NV = torch.log_softmax(z_NV, dim=-1)
    kept_N1 = (target_N != IGNORED)[:, None]
    at_N1 = target_N.clamp(min=0)[:, None]
    loss = -(log_p_NV.gather(1, at_N1) * kept_N1).sum()
    dz_NV = log_p_NV.exp_()
    dz_NV.scatter_add_(1, at_N1, torch.full_like(at_N1, -1, dtype=dz_NV.dtype))
    dz_NV *= kept_N1 / scale
    if cap is not None:
        dz_NV *= 1 - (z_NV / cap) ** 2
    return loss, dz_NV.to(l_NV.dtype)
