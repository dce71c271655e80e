"""The tensors of the file before they are read: names, shapes, types and where their values are.

1-D tensors are f32. Matrices are f16, f32 or q4_0, with two exceptions. In a q4_0 file
output.weight is q8_0, as PowerInfer's `quantize` writes it where rows are not multiples of 256 (an
OPT has no output matrix and uses its embedding). In an f32 file ffn_down_t is f16: the engine
computes NaN without an error from anything but f16 and q4_0 there. Predictors are f16, q8_0 or
q4_0 whatever the model is. A Granite's or MiniCPM's scales, which the engine's llama does not
have, are part of the file's weights (core/models/scales.py). (PowerInfer's llama.cpp and ggml.h at
d3ebd7c.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from sparsecast.core.errors import InputError
from sparsecast.core.ggml_blocks import BLOCK
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.scales import HEAD, Scales
from sparsecast.export.write.hparams import HParams
from sparsecast.export.write.tensor_map import Layout, Row, arranged, model_rows, predictor_names
from sparsecast.predictors.checkpoint import PredictorSet


class PlannedTensor(NamedTuple):
    """A tensor of the file before it is read."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    load: Callable[[], Tensor | Iterator[Tensor]]
    """Returns the tensor, or its rows in blocks of any number of rows."""
    factor: float = 1.0
    """What the file's values are more than those that `load` returns."""

    @property
    def nbytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.type]
        return int(np.prod(self.shape)) // block * size


def plan_tensors(
    checkpoint: Checkpoint, hparams: HParams, predictors: PredictorSet, dtype: str
) -> list[PlannedTensor]:
    """List the tensors in file order; nothing is read yet.

    Args:
        dtype: "f16", "f32" or "q4_0", for the model's matrices. Predictors keep their own formats.

    Raises:
        InputError: A size that does not divide into the blocks of a quantized tensor.
    """
    if dtype == "q4_0":
        _check_blocks(hparams)
    return [*_model_tensors(checkpoint, hparams, dtype), *predictor_tensors(predictors)]


def _check_blocks(hparams: HParams) -> None:
    """Refuse sizes that are not multiples of 32.

    Every matrix has rows of the hidden size, and the input of ffn_down_t is rounded in blocks along
    the FFN. The engine checks neither and computes nonsense or NaN.
    """
    for name, width in (("hidden size", hparams.hidden), ("FFN width", hparams.ffn)):
        if width % BLOCK:
            raise InputError(
                f"--dtype q4_0: weights and inputs are stored in blocks of {BLOCK}, but the "
                f"{name} is {width}, not a multiple, and the engine would read it wrongly; export "
                "in f16"
            )


def _model_tensors(checkpoint: Checkpoint, hparams: HParams, dtype: str) -> Iterator[PlannedTensor]:
    for row in model_rows(hparams.arch, hparams.layers, tied=hparams.tied, norms=hparams.norms):
        shape = hparams.shape(row.shape)
        if row.layout is Layout.TRANSPOSED:
            shape = shape[::-1]
        load = partial(_load, checkpoint, hparams, row)
        factor = factor_of(row.target, row.source, hparams.scales)
        yield PlannedTensor(row.target, shape, type_of(row, dtype), load, factor)


def type_of(row: Row, dtype: str) -> GGMLQuantizationType:
    """Return a tensor's type in a file whose matrices are in `dtype`."""
    if len(row.shape) == 1:
        return GGMLQuantizationType.F32
    if dtype == "f32" and row.layout is Layout.TRANSPOSED:
        return GGMLQuantizationType.F16
    if dtype == "q4_0" and row.target == "output.weight":
        return GGMLQuantizationType.Q8_0
    return GGMLQuantizationType[dtype.upper()]


def factor_of(target: str, source: str, scales: Scales | None) -> float:
    """Return the factor of a tensor; a tied head has the embedding as its source."""
    if scales is None:
        return 1.0
    return scales.factor(f"{HEAD}.weight" if target == "output.weight" else source)


def _load(checkpoint: Checkpoint, hparams: HParams, row: Row) -> Tensor:
    return arranged(checkpoint.tensor(row.source), row.layout, hparams.heads, hparams.kv_heads)


def predictor_tensors(predictors: PredictorSet) -> Iterator[PlannedTensor]:
    """Plan fc1 and fc2 of every layer, in the predictors' own formats.

    Raises:
        InputError: Rows that do not divide into the blocks of a quantized predictor.
    """
    for i, predictor in enumerate(predictors.layers):
        kind = GGMLQuantizationType[predictor.dtype.upper()]
        block = GGML_QUANT_SIZES[kind][0]
        for name, weight in zip(predictor_names(i), predictor.weights, strict=True):
            if weight.shape[1] % block:
                raise InputError(
                    f"{name}: is {predictor.dtype}, stored in blocks of {block} along a row, but "
                    f"its rows hold {weight.shape[1]} weights, and the engine would read them "
                    f"wrongly; train predictors of a rank that is a multiple of {block}, or in f16"
                )
            yield PlannedTensor(name, tuple(weight.shape), kind, partial(_same, weight))


def _same(weight: Tensor) -> Tensor:
    return weight
