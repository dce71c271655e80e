"""Energies of active entries in one byte each, for energy recall and for training by value.

The energy of an active entry is (x1_j * ||down column j||)^2, the squared norm of what the neuron
adds to the residual stream. Where an RMS norm stands between x1 and down (BitNet), x1 is divided by
its root mean square over F, and the column is multiplied by the norm's weight j. The energy's root,
the amplitude, is stored on a logarithmic scale:

    code = clamp(round(8 * log2(amplitude)) + 144, 0, 255),    amplitude = 2 ** ((code - 144) / 8)

so an amplitude between 2^-18 and 2^13.9 is kept within 4.5 %, without bias. What lies beyond is
moved to the nearest end.

Shape letters: T tokens, F FFN width, N active entries, token by token, neurons ascending.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

STEPS = 8
"""Codes per octave."""
ZERO = 144
"""The code of amplitude 1."""


class Gains(NamedTuple):
    """What a layer's x1 is multiplied by on its way to the residual stream."""

    gain_F: Tensor
    """float32, see `Family.x1_gains`."""
    eps: float | None = None
    """Added to the mean square of x1 in the RMS norm behind it; None if there is no norm."""


def encode(x1_TF: Tensor, gains: Gains, mask_TF: Tensor) -> Tensor:
    """(N,) uint8 codes of the entries where `mask_TF` is true."""
    return _code(_added(x1_TF, gains)[mask_TF])


def encode_all(x1_TF: Tensor, gains: Gains) -> Tensor:
    """(T, F) uint8 codes of every entry; 0 where x1 is zero."""
    return _code(_added(x1_TF, gains))


def _added(x1_TF: Tensor, gains: Gains) -> Tensor:
    """What each neuron adds to the residual stream, with x1's sign: (T, F) float32."""
    if gains.eps is not None:
        x1_TF = x1_TF.float()
        x1_TF = x1_TF * (x1_TF.square().mean(1, keepdim=True) + gains.eps).rsqrt()
    return x1_TF * gains.gain_F.to(x1_TF.device)


def _code(added: Tensor) -> Tensor:
    """Codes of amplitudes, computed in their place."""
    steps = added.abs_().log2_().mul_(STEPS).add_(ZERO)
    return steps.round_().clamp_(0, 255).to(torch.uint8)


def decode(code_N: Tensor) -> Tensor:
    """(N,) float32 energies."""
    return torch.exp2((code_N.float() - ZERO) * (2 / STEPS))


def amplitudes(code_N: Tensor) -> Tensor:
    """float32 amplitudes of codes of any shape."""
    return torch.exp2((code_N.float() - ZERO) * (1 / STEPS))
