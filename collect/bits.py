"""Bool masks as packed bytes, eight neurons a byte, the first neuron in the lowest bit.

Shape letters: T tokens, F FFN width, P packed width, ceil(F / 8).
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack(mask_TF: Tensor) -> Tensor:
    """(T, F) bool to (T, P) uint8 on the same device; bits past F are zero."""
    n_tokens, width = mask_TF.shape
    padded = torch.nn.functional.pad(mask_TF, (0, -width % 8)).view(n_tokens, -(-width // 8), 8)
    weights = 1 << torch.arange(8, device=mask_TF.device, dtype=torch.uint8)
    return (padded.to(torch.uint8) * weights).sum(-1, dtype=torch.uint8)


def unpack(packed_TP: Tensor, width: int) -> Tensor:
    """(T, P) uint8 to (T, width) bool on the same device."""
    shifts = torch.arange(8, device=packed_TP.device, dtype=torch.uint8)
    bits = (packed_TP.unsqueeze(-1) >> shifts) & 1
    return bits.flatten(-2)[..., :width].bool()
