"""Pack bool masks: eight neurons per byte, the first neuron in the lowest bit.

A bool matrix is read as little-endian 64-bit words of eight 0/1 bytes: one multiplication gathers
the eight, and one addition adds eight counters, which hold up to 255 each.

Shape letters: T tokens, F FFN width, P packed width, ceil(F / 8).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

GATHER = 0x0102040810204080
"""Times eight 0/1 bytes: the top byte has byte i's bit at place i."""
LANE = 255
"""Words that can be added before a byte overflows."""


def pack(mask_TF: Tensor) -> Tensor:
    """Pack (T, F) bool to (T, P) uint8 on the same device; bits past F are zero."""
    words_TP = _words(mask_TF)
    return (words_TP * GATHER).flatten().view(torch.uint8)[7::8].reshape(words_TP.shape)


def unpack(packed_TP: Tensor, width: int) -> Tensor:
    """Unpack (..., P) uint8 to (..., width) bool on the same device."""
    words = _spread(packed_TP.device)[packed_TP.int()]
    return words.view(torch.bool)[..., :width]


@cache
def _spread(device: torch.device) -> Tensor:
    """Return (256,) int64: each byte's eight bits as eight 0/1 bytes, lowest first."""
    bits = (torch.arange(256)[:, None] >> torch.arange(8)) & 1
    return bits.to(torch.uint8).contiguous().view(torch.int64)[:, 0].to(device)


def count_per_token(mask_TF: Tensor) -> Tensor:
    """Count the neurons that fired on each token, (T, F) bool to (T,) int32."""
    words_TP = _words(mask_TF)
    n_tokens, width = words_TP.shape
    group = next(size for size in range(min(width, LANE), 0, -1) if width % size == 0)
    lanes = words_TP.view(n_tokens, width // group, group).sum(2)
    return lanes.view(torch.uint8).sum(1, dtype=torch.int32)


def count_per_neuron(mask_TF: Tensor) -> Tensor:
    """Count the tokens on which each neuron fired, (T, F) bool to (F,) int32."""
    words_TP = _words(mask_TF)
    full = len(words_TP) // LANE * LANE
    lanes = [
        words_TP[:full].view(full // LANE, LANE, words_TP.shape[1]).sum(1),
        words_TP[full:].sum(0)[None],
    ]
    counts = torch.cat(lanes).view(torch.uint8).sum(0, dtype=torch.int32)
    return counts[: mask_TF.shape[1]]


def _words(mask_TF: Tensor) -> Tensor:
    """Return (T, P) int64."""
    if spare := -mask_TF.shape[1] % 8:
        mask_TF = torch.nn.functional.pad(mask_TF, (0, spare))
    words = mask_TF.contiguous().flatten().view(torch.int64)
    return words.view(len(mask_TF), mask_TF.shape[1] // 8)
