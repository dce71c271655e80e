"""One forward pass for the experts of all mixtures, whose activations can be seen.

transformers keeps the experts of a layer as 3-D parameters and runs them in fused kernels, so there
is no module whose input is x1. `ExpertLoop` takes the place of that forward pass: it runs one
expert after the other on the tokens that were routed to it,

    x1 = act(gate x) * up x,    y_token = sum over its experts of weight * (down x1)

with relu on up as well for dReLU (Turbo Sparse, arXiv 2406.05955). `install_loops` puts
it into every layer when a model is loaded (experts.py).

A module of experts has the attribute `act_fn`, is called with (hidden, chosen experts, their
weights), and keeps its weights either as `gate_up_proj` and `down_proj`, as Mixtral does, or as
children "0", "1", ... with `gate`, `up` and `down`, as SmallThinker's files do.

Shape letters: N tokens of a batch, padding included, T those routed to one expert, k experts per
token, E experts, D hidden, F FFN width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

Seen = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Takes (expert, tokens (T,), their slots (T,), x1 (T, F)) and returns the x1 to go on with. A slot
says which of a token's k choices the expert is."""


class Matrices(NamedTuple):
    """The weights of one expert, as views."""

    gate_FD: Tensor
    up_FD: Tensor
    down_DF: Tensor


class ExpertLoop:
    """Run a layer's experts one after the other, in the dtype of their inputs.

    Equals transformers' own forward pass up to rounding. Memory: one expert's activations.

    Args:
        experts: The module whose forward pass this is.
        relu_up: Whether up passes through ReLU as well.
    """

    def __init__(self, experts: nn.Module, *, relu_up: bool = False) -> None:
        self._experts = experts
        self.relu_up = relu_up
        self.on_x1: Seen | None = None
        """Called with every expert's x1."""
        self.ffn: Callable[[int, Tensor], Tensor] | None = None
        """Computes an expert's output (T, D) from its inputs (T, D), in place of the dense FFN."""

    def __call__(self, x_ND: Tensor, chosen_Nk: Tensor, weight_Nk: Tensor) -> Tensor:
        out_ND = torch.zeros_like(x_ND)
        for expert in sorted(set(chosen_Nk.flatten().tolist())):
            token_T, slot_T = (chosen_Nk == expert).nonzero(as_tuple=True)
            y_TD = self._expert(expert, x_ND[token_T], token_T, slot_T)
            y_TD = y_TD * weight_Nk[token_T, slot_T, None]
            out_ND.index_add_(0, token_T, y_TD.to(out_ND.dtype))
        return out_ND

    def _expert(self, expert: int, x_TD: Tensor, token_T: Tensor, slot_T: Tensor) -> Tensor:
        if self.ffn is not None:
            return self.ffn(expert, x_TD)
        w = expert_matrices(self._experts, expert)
        up_TF = nn.functional.linear(x_TD, w.up_FD)
        act: Any = self._experts.act_fn
        x1_TF = act(nn.functional.linear(x_TD, w.gate_FD)) * (
            up_TF.relu() if self.relu_up else up_TF
        )
        if self.on_x1 is not None:
            x1_TF = self.on_x1(expert, token_T, slot_T, x1_TF)
        return nn.functional.linear(x1_TF, w.down_DF)


def expert_matrices(experts: nn.Module, expert: int) -> Matrices:
    """Return the weights of one expert."""
    if hasattr(experts, "gate_up_proj"):
        gate_up = cast(Tensor, experts.gate_up_proj)[expert]
        gate_FD, up_FD = gate_up.chunk(2, dim=0)
        return Matrices(gate_FD, up_FD, cast(Tensor, experts.down_proj)[expert])
    one: Any = experts.get_submodule(str(expert))
    return Matrices(one.gate.weight, one.up.weight, one.down.weight)
