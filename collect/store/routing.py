"""The rows of one expert in a shard: of the tokens that the router gave to it.

Shape letters: T tokens, k experts per token, D hidden, P packed width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparsecast.core.manifests import is_count


def routed_tokens(tensors: Mapping[str, Tensor], layer: int, expert: int) -> Tensor:
    """Return the tokens (T,) int64 of a shard that were routed to an expert, rising."""
    chosen_Tk = tensors[f"layer.{layer}.chosen"]
    return (chosen_Tk == expert).any(1).nonzero()[:, 0]


def expert_rows(
    tensors: Mapping[str, Tensor], layer: int, expert: int, token_T: Tensor
) -> tuple[Tensor, Tensor]:
    """Return copies of inputs x (T, D) and packed masks (T, P) uint8 of tokens in an expert.

    Args:
        token_T: Any of `routed_tokens`, any number of times each. int8 inputs come as float32.
    """
    slot_T = (tensors[f"layer.{layer}.chosen"][token_T] == expert).to(torch.uint8).argmax(1)
    x_TD = tensors[f"layer.{layer}.x"][token_T]
    if x_TD.dtype == torch.int8:
        x_TD = x_TD.float() * tensors[f"layer.{layer}.scale"][token_T, None]
    return x_TD, tensors[f"layer.{layer}.mask"][token_T, slot_T]


def is_routing(experts: Any, per_token: Any) -> bool:
    """Return whether two values of a manifest can be numbers of experts per layer and per token."""
    if not is_count(experts, least=0) or not is_count(per_token, least=0):
        return False
    return bool(1 <= per_token <= experts if experts else per_token == 0)
