"""Energies of active entries in one byte each, for energy recall.

The energy of an active entry is (x1_j * ||down column j||)^2, the squared norm of what the neuron
adds to the residual stream. Where a norm stands between x1 and down (BitNet), the column is
multiplied by the norm's weight j, and the energy is that squared norm times the mean square of x1.
Its root, the amplitude, is stored on a logarithmic scale:

    code = clamp(round(8 * log2(amplitude)) + 144, 0, 255),    amplitude = 2 ** ((code - 144) / 8)

so an amplitude between 2^-18 and 2^13.9 is kept within 4.5 %, without bias. What lies beyond is
moved to the nearest end.

Shape letters: T tokens, F FFN width, N active entries, token by token, neurons ascending.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 8
"""Codes per octave."""
ZERO = 144
"""The code of amplitude 1."""


def encode(x1_TF: Tensor, norm_F: Tensor, mask_TF: Tensor) -> Tensor:
    """(N,) uint8 codes of the entries where `mask_TF` is true.

    Args:
        norm_F: float32, see `Family.x1_gains`.
    """
    amplitude_N = (x1_TF.float() * norm_F)[mask_TF].abs()
    return (amplitude_N.log2() * STEPS + ZERO).round_().clamp_(0, 255).to(torch.uint8)


def decode(code_N: Tensor) -> Tensor:
    """(N,) float32 energies."""
    return torch.exp2((code_N.float() - ZERO) * (2 / STEPS))
