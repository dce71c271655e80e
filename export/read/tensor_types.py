"""How the elements of a GGUF tensor lie in the file, by type id.

Ids below 16 mean the same everywhere. From 16 on a PowerInfer file ("PWRI") has the integers that
ggml had when PowerInfer left it, a "GGUF" file has what ggml put in their place since.
(ggml.h of PowerInfer at d3ebd7c; GGUF's specification.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class TensorType(NamedTuple):
    """How a type id stores `block` elements in `nbytes` bytes."""

    name: str
    block: int
    nbytes: int
    dtype: torch.dtype = torch.float32
    """Of the values that a reader gets."""


_COMMON = {
    0: TensorType("f32", 1, 4, torch.float32),
    1: TensorType("f16", 1, 2, torch.float16),
    2: TensorType("q4_0", 32, 18),
    3: TensorType("q4_1", 32, 20),
    6: TensorType("q5_0", 32, 22),
    7: TensorType("q5_1", 32, 24),
    8: TensorType("q8_0", 32, 34),
    9: TensorType("q8_1", 32, 40),
    10: TensorType("q2_K", 256, 84),
    11: TensorType("q3_K", 256, 110),
    12: TensorType("q4_K", 256, 144),
    13: TensorType("q5_K", 256, 176),
    14: TensorType("q6_K", 256, 210),
    15: TensorType("q8_K", 256, 292),
}
TYPES = {
    b"PWRI": {
        **_COMMON,
        16: TensorType("i8", 1, 1, torch.int8),
        17: TensorType("i16", 1, 2, torch.int16),
        18: TensorType("i32", 1, 4, torch.int32),
    },
    b"GGUF": {
        **_COMMON,
        16: TensorType("iq2_xxs", 256, 66),
        17: TensorType("iq2_xs", 256, 74),
        18: TensorType("iq3_xxs", 256, 98),
        19: TensorType("iq1_s", 256, 50),
        20: TensorType("iq4_nl", 32, 18),
        21: TensorType("iq3_s", 256, 110),
        22: TensorType("iq2_s", 256, 82),
        23: TensorType("iq4_xs", 256, 136),
        24: TensorType("i8", 1, 1, torch.int8),
        25: TensorType("i16", 1, 2, torch.int16),
        26: TensorType("i32", 1, 4, torch.int32),
        27: TensorType("i64", 1, 8, torch.int64),
        28: TensorType("f64", 1, 8, torch.float64),
        29: TensorType("iq1_m", 256, 56),
        30: TensorType("bf16", 1, 2, torch.bfloat16),
    },
}
"""By the magic at the beginning of the file."""
DECODED = ("q4_0", "q8_0")
"""Types in blocks whose values are read; of the others only the place is known."""
