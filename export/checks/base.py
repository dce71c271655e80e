"""The result of a check, and the comparison of tensors.

The tables in metadata.py, tensors.py and sources.py are written from PowerInfer's llama.cpp a
second time and share nothing with the exporter's: a table for both would confirm its own mistakes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Check:
    """One line of verify's result."""

    name: str
    ok: bool
    detail: str


def same(a: Tensor, b: Tensor) -> bool:
    """Equal in shape and value; -0 equals 0, NaN equals nothing."""
    return a.shape == b.shape and torch.equal(a, b)
