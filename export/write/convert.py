"""A tensor of the file: planned before it is read, then converted to the bytes that are written.

Rows are converted a slab at a time, small enough to stay in a core's cache: whatever the tensor's
size, it takes a few slabs of memory, and a tenth of the time of the whole at once (1.1 billion
weights from bf16 to f16 on one core of an EPYC: 1.3 instead of 10.8 seconds). They pass through
float32, which torch converts from and to faster than bf16 to f16, and which is what the gguf
package quantizes, by the arithmetic of ggml's reference code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import quantize
from torch import Tensor

from sparsecast.core.errors import InputError

SLAB = 2**18
"""Weights that are converted together; one row where a row holds more."""

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


@contextmanager
def one_thread() -> Iterator[None]:
    """Slabs are too small to share: on a busy machine two threads that wait for each other take
    five times as long as one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def slabs(planned: Planned) -> Iterator[Array]:
    """The tensor as the file holds it, C-contiguous rows after rows.

    Raises:
        InputError: It holds a value that its format cannot.
    """
    source = planned.load()
    convert = _quantized if GGML_QUANT_SIZES[planned.kind][0] > 1 else _floats
    for rows in torch.split(source, max(1, SLAB // source[0].numel())):
        yield convert(planned, rows)


def _floats(planned: Planned, rows: Tensor) -> Array:
    dtype = torch.float16 if planned.kind is GGMLQuantizationType.F16 else torch.float32
    converted = rows.float().to(dtype).contiguous()
    # NaN and infinity show in these two, at a tenth of the cost of asking every value.
    if not all(extreme.isfinite() for extreme in converted.aminmax()):
        raise _too_large(planned, rows)
    array: Array = converted.numpy()
    return array


def _quantized(planned: Planned, rows: Tensor) -> Array:
    """(rows, bytes of a row) uint8."""
    with np.errstate(all="ignore"):  # a value too large for its scale is told below
        packed: Array = quantize(rows.float().contiguous().numpy(), planned.kind)
    scales = packed.reshape(-1, GGML_QUANT_SIZES[planned.kind][1])[:, :2].copy().view(np.float16)
    if not np.isfinite(scales).all():
        raise _too_large(planned, rows)
    return packed


def _too_large(planned: Planned, rows: Tensor) -> InputError:
    kind = planned.kind.name.lower()
    beyond = {
        "f16": " or beyond 65504",
        "q8_0": " or beyond 127 * 65504",
        "q4_0": " or beyond 524032",
    }
    return InputError(
        f"{planned.name}: holds {rows.abs().max().item():g}, which {kind} cannot store (NaN, "
        f"infinity{beyond.get(kind, '')}); the engine would compute NaN from it, so it cannot be "
        "exported"
    )
