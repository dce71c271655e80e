"""Compute the FFN traffic of a file, with f16 weights as in every report and with its own types.

Decoding reads the whole predictor, and the rows of the FFN's matrices that it selects:

    traffic = predictor bytes / FFN bytes + 1 - predicted sparsity

Reports count 2 bytes per FFN weight, so that figures can be compared. With smaller FFN weights the
same predictor is a larger share, so the second figure is the larger one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from statistics import fmean

from sparsecast.predictors.formats import BITS

FFN = ("ffn_gate", "ffn_up", "ffn_down_t")
PREDICTOR = ("fc1", "fc2")
FILE_BITS = {**BITS, "f32": 32.0}

Stored = Mapping[str, tuple[str, tuple[int, ...]]]
"""Type and shape of a file's tensors, by name."""


@dataclass(frozen=True)
class Traffic:
    """Traffic per layer, from the calibration split."""

    reported: list[float]
    """With FFN weights in f16."""
    own: list[float]
    """With the file's types."""
    types: str
    """Description of the file's types."""

    @property
    def in_f16(self) -> bool:
        """Whether the two are the same."""
        return self.types.startswith("FFN f16,")

    def __str__(self) -> str:
        mean = f"mean {fmean(self.reported):.4f} with the FFN counted in f16, as in every report"
        return f"{mean}; {fmean(self.own):.4f} with the types of this file ({self.types})"


def traffic_of(tensors: Stored, calibration: Sequence[Mapping[str, float]]) -> Traffic:
    """Compute both figures of a file.

    Args:
        calibration: Scores of every layer, with `predicted_sparsity`.
    """
    reported, own = [], []
    for i, scores in enumerate(calibration):
        names = [f"blk.{i}.{name}.weight" for name in FFN]
        ffn = [tensors[name] for name in names if name in tensors]
        predictor = sum(_bits(*tensors[f"blk.{i}.{name}.weight"]) for name in PREDICTOR)
        load = 1 - scores["predicted_sparsity"]
        reported.append(predictor / sum(_bits("f16", shape) for _, shape in ffn) + load)
        own.append(predictor / sum(_bits(*tensor) for tensor in ffn) + load)
    return Traffic(reported, own, f"{_ffn_types(tensors)}, predictors {_types(tensors, PREDICTOR)}")


def _bits(dtype: str, shape: tuple[int, ...]) -> float:
    return prod(shape) * FILE_BITS[dtype]


def _ffn_types(tensors: Stored) -> str:
    every, down = _types(tensors, FFN), _types(tensors, FFN[2:])
    first = _types(tensors, FFN[:2])
    names = "gate and up" if "blk.0.ffn_gate.weight" in tensors else "up"
    return f"FFN {every}" if first == down else f"{names} {first}, down {down}"


def _types(tensors: Stored, names: Sequence[str]) -> str:
    ends = tuple(f".{name}.weight" for name in names)
    return "/".join(sorted({dtype for name, (dtype, _) in tensors.items() if name.endswith(ends)}))
