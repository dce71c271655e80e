"""Where kernels run, and memory that tells when one of them reads or writes what is not its own.

Whatever a kernel's wrapper allocates holds NaN (or a large integer), inside bands of the same that
are checked afterwards; weights and inputs lie in such bands as well.
"""

from __future__ import annotations

import math

import pytest
import torch

BAND = 64
"""Elements on either side."""
real_empty = torch.empty


def poison(dtype: torch.dtype) -> float | int:
    return math.nan if dtype.is_floating_point else min(torch.iinfo(dtype).max, 2**30 - 1)


def is_poison(tensor: torch.Tensor) -> bool:
    if tensor.dtype.is_floating_point:
        return bool(tensor.isnan().all())
    return bool((tensor == poison(tensor.dtype)).all())


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _banded_memory(monkeypatch):
    """Every `torch.empty` of a test."""
    buffers = []

    def empty(*size, **options):
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        count = math.prod(shape)
        buffer = real_empty(count + 2 * BAND, **options)
        if type(buffer) is not torch.Tensor or buffer.is_meta:  # torch.compile asks for shapes
            return real_empty(shape, **options)
        buffer.fill_(poison(buffer.dtype))
        buffers.append((buffer, count))
        return buffer[BAND : BAND + count].view(shape)

    monkeypatch.setattr(torch, "empty", empty)
    yield
    for buffer, count in buffers:
        assert is_poison(buffer[:BAND]), "written before a buffer's begin"
        assert is_poison(buffer[BAND + count :]), "written behind a buffer's end"


@pytest.fixture
def banded(device):
    """A copy of a tensor on the device, in a band of poison."""

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        inside = torch.empty(*tensor.shape, dtype=tensor.dtype, device=device)
        return inside.copy_(tensor)

    return copy


@pytest.fixture
def matrix(banded):
    """Random weights whose products with inputs of order 1 are of order 1."""

    def make(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        return banded((torch.randn(rows, columns) * columns**-0.5).to(dtype))

    return make


@pytest.fixture
def near():
    """max |out - ref| / max |ref| below what the dtype allows; NaN never is."""
    limits = {torch.float16: 2e-3, torch.bfloat16: 1e-2}

    def check(got: torch.Tensor, want: torch.Tensor) -> None:
        assert got.shape == want.shape
        scale = float(want.abs().max()) if want.numel() else 0.0
        error = float((got.double() - want.double()).abs().max()) if want.numel() else 0.0
        assert error <= limits[got.dtype] * scale, f"off by {error}, of {scale}"

    return check
