"""The FFN as vLLM holds it, gate and up in one matrix: dense, or exact for few tokens.

Neither needs vLLM. Shape letters: T tokens, D hidden, F FFN width of this process (a part of the
model's under tensor parallelism: every operation here is per neuron, but for the last sum).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsecast.core.models.activations import ActivationRule
from sparsecast.kernels.in_models import torch_fallback
from sparsecast.kernels.in_models.sparse_ffn import runs_kernels
from sparsecast.kernels.ops.ffn import FFN, exact_ffn
from sparsecast.kernels.ops.launch import MAX_TOKENS


class SparseAndMul(nn.Module):
    """(..., 2F) gate and up to (..., F) x1, in the input's dtype.

    FATReLU keeps what reaches its threshold, rounded to the dtype. vLLM's own `FatreluAndMul` keeps
    only what is above it.
    """

    def __init__(self, rule: ActivationRule) -> None:
        super().__init__()
        self.rule = rule
        self.act = rule.module()

    def forward(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        activated: Tensor = self.act(gate)
        return activated * (up.relu() if self.rule.on_up else up)

    def extra_repr(self) -> str:
        return str(self.rule)


def exact_or_dense(
    x_TD: Tensor, gate_up: Tensor, down_DF: Tensor, act: str, threshold: float
) -> Tensor:
    """Compute the FFN, (T, D): up to 16 tokens by the kernels, more by dense products.

    One operator to torch.compile, which sees a symbolic T: which of the two runs is decided at each
    call, or for each captured size of a CUDA graph.

    Args:
        x_TD: The FFN's input, behind the norm.
        gate_up: (2F, D), the gate's rows first.
        down_DF: The kernels need it as the transpose of a contiguous (F, D), see `by_rows`;
            otherwise the dense products run.
        act: relu, fatrelu, drelu or relu2.
        threshold: FATReLU's.
    """
    y_TD: Tensor = _exact_or_dense(x_TD, gate_up, down_DF, act, threshold)
    return y_TD


@torch.library.custom_op("sparsecast::vllm_ffn", mutates_args=())
def _exact_or_dense(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, act: str, threshold: float
) -> torch.Tensor:
    gate_FD, up_FD = gate_up.chunk(2)
    down_FD = down.t()
    ffn = FFN(gate_FD, up_FD, down_FD, act=act, threshold=threshold)
    if 1 <= len(x) <= MAX_TOKENS and runs_kernels(x) and down_FD.is_contiguous():
        return exact_ffn(x, ffn)[0]
    return torch_fallback.dense(x, ffn)


@_exact_or_dense.register_fake
def _shape(x: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(x)


def by_rows(down_DF: Tensor) -> Tensor:
    """Return the same values as the transpose of a contiguous (F, D): one row per neuron."""
    return down_DF.t().contiguous().t()
