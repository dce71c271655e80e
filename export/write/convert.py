"""Convert a planned tensor to the bytes of the file, a slab of rows at a time.

A slab is small enough to stay in a core's cache. A tensor of any size takes a few slabs of memory,
and a tenth of the time of a conversion in one piece (1.1 billion weights from bf16 to f16 on one
core of an EPYC: 1.3 instead of 10.8 seconds). Values pass through float32: torch converts it faster
than bf16 to f16 directly, and the gguf package quantizes from it, by the arithmetic of ggml's
reference code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import quantize
from torch import Tensor

from sparsecast.core.errors import InputError
from sparsecast.core.models.scales import folded
from sparsecast.export.write.tensor_plan import PlannedTensor

SLAB = 2**18
"""Weights converted together; a single row where it holds more."""

Array = np.ndarray[Any, Any]


@contextmanager
def one_thread() -> Iterator[None]:
    """Limit torch to one thread inside the block.

    Slabs are too small to share: on a busy machine two threads that wait for each other take five
    times as long as one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def slabs(planned: PlannedTensor) -> Iterator[Array]:
    """Yield the rows of a tensor as the file holds them, C-contiguous.

    Raises:
        InputError: A value that the tensor's format cannot hold.
    """
    loaded = planned.load()
    convert = _quantized if GGML_QUANT_SIZES[planned.type][0] > 1 else _floats
    for source in [loaded] if isinstance(loaded, Tensor) else loaded:
        for rows in torch.split(source, max(1, SLAB // source[0].numel())):
            yield convert(planned, folded(rows, planned.factor))


def _floats(planned: PlannedTensor, rows: Tensor) -> Array:
    dtype = torch.float16 if planned.type is GGMLQuantizationType.F16 else torch.float32
    converted = rows.float().to(dtype).contiguous()
    # Any NaN or infinity shows in the extremes, at a tenth of the cost of testing every value.
    if not all(extreme.isfinite() for extreme in converted.aminmax()):
        raise _too_large(planned, rows)
    array: Array = converted.numpy()
    return array


def _quantized(planned: PlannedTensor, rows: Tensor) -> Array:
    """Quantize to (rows, bytes of a row) uint8."""
    with np.errstate(all="ignore"):  # values beyond the scale are refused below
        packed: Array = quantize(rows.float().contiguous().numpy(), planned.type)
    scales = packed.reshape(-1, GGML_QUANT_SIZES[planned.type][1])[:, :2].copy().view(np.float16)
    if not np.isfinite(scales).all():
        raise _too_large(planned, rows)
    return packed


def _too_large(planned: PlannedTensor, rows: Tensor) -> InputError:
    kind = planned.type.name.lower()
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
