"""What vLLM's tokens are compared with."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Reference(NamedTuple):
    """What transformers generates; logprobs and margins are (prompts, tokens)."""

    ids: list[list[int]]
    logprobs: torch.Tensor
    margins: torch.Tensor
    """The least |gate - T| of FATReLU so far in the sequence. FATReLU jumps at T, so where a gate
    is within rounding of it two programs may differ, and so may every token behind it."""
