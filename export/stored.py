"""A tensor of the file: planned before it is read, then converted to the bytes that are written.

q8_0 and q4_0 are quantised by the gguf package, whose arithmetic is that of ggml's reference code.
It wants float32, so rows go through it a slab at a time: a quantised tensor costs its own bytes and
what `SLAB` weights take on the way, not a float32 copy of the whole (32,000 x 4096 weights in q4_0:
70 MiB, and the process grew by 91).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import quantize
from torch import Tensor

from sparsecast.collect.errors import InputError

SLAB = 2**20
"""Weights that are quantised together; one row where a row holds more."""

Array = np.ndarray[Any, Any]


class Planned(NamedTuple):
    """A tensor of the file before it is read."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    load: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.kind]
        return int(np.prod(self.shape)) // block * size


def stored(planned: Planned) -> Array:
    """The tensor as the file holds it, C-contiguous.

    Raises:
        InputError: It holds a value that its format cannot.
    """
    source = planned.load()
    if GGML_QUANT_SIZES[planned.kind][0] > 1:
        return _quantised(planned, source)
    dtype = torch.float16 if planned.kind is GGMLQuantizationType.F16 else torch.float32
    converted = torch.empty(planned.shape, dtype=dtype).copy_(source)
    if not bool(converted.isfinite().all()):
        raise _too_large(planned, source)
    array: Array = converted.numpy()
    return array


def _quantised(planned: Planned, source: Tensor) -> Array:
    """(rows, bytes of a row) uint8."""
    rows, width = planned.shape
    block, size = GGML_QUANT_SIZES[planned.kind]
    out = np.empty((rows, width // block * size), np.uint8)
    step = max(1, SLAB // width)
    for start in range(0, rows, step):
        slab = source[start : start + step].float().contiguous()
        with np.errstate(all="ignore"):  # a value too large for its scale is told below
            packed = quantize(slab.numpy(), planned.kind)
        scales = packed.reshape(-1, size)[:, :2].copy().view(np.float16)
        if not np.isfinite(scales).all():
            raise _too_large(planned, slab)
        out[start : start + step] = packed
    return out


def _too_large(planned: Planned, source: Tensor) -> InputError:
    kind = planned.kind.name.lower()
    beyond = {
        "f16": " or beyond 65504",
        "q8_0": " or beyond 127 * 65504",
        "q4_0": " or beyond 524032",
    }
    return InputError(
        f"{planned.name}: holds {source.abs().max().item():g}, which {kind} cannot store (NaN, "
        f"infinity{beyond.get(kind, '')}); the engine would compute NaN from it, so it cannot be "
        "exported"
    )
