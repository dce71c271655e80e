"""The tensors of the file before they are read: names, shapes, types and where their values are.

1-D tensors and routers are f32. Matrices are f32, f16, q8_0 or q4_0; beside q4_0 the output matrix
is q8_0, and so is an embedding that takes its part: llama.cpp's own quantizer gives both more bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from sparsecast.core.errors import InputError
from sparsecast.core.ggml_blocks import BLOCK
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.export.to_gguf.hparams import ReLULlama, Row
from sparsecast.export.write.tensor_plan import PlannedTensor, factor_of


def plan_tensors(checkpoint: Checkpoint, hparams: ReLULlama, dtype: str) -> list[PlannedTensor]:
    """List the tensors in file order; nothing is read yet.

    Args:
        dtype: "f32", "f16", "q8_0" or "q4_0".

    Raises:
        InputError: Rows that do not divide into the blocks of a quantized format.
    """
    if dtype in ("q4_0", "q8_0"):
        _check_blocks(hparams, dtype)
    return list(_tensors(checkpoint, hparams, dtype))


def _check_blocks(hparams: ReLULlama, dtype: str) -> None:
    widths = {
        "hidden size": hparams.hidden,
        "heads' total size": hparams.heads * hparams.head_dim,
        "FFN width": hparams.ffn,
    }
    for name, width in widths.items():
        if width % BLOCK:
            raise InputError(
                f"--dtype {dtype}: weights are stored in blocks of {BLOCK} along a row, but the "
                f"{name} is {width}, not a multiple; export in f16"
            )


def _tensors(checkpoint: Checkpoint, hparams: ReLULlama, dtype: str) -> Iterator[PlannedTensor]:
    for row in hparams.rows():
        shape = hparams.shape(row.shape)
        yield PlannedTensor(
            row.target,
            (1, *shape) if row.expert else shape,
            _type_of(row, hparams, dtype),
            partial(checkpoint.tensor, row.source),
            factor_of(row.target, row.source, hparams.scales),
        )
    for i in range(hparams.layers):
        router = f"blk.{i}.ffn_gate_inp.weight"
        load = partial(_zeros, hparams.hidden)
        yield PlannedTensor(router, (1, hparams.hidden), GGMLQuantizationType.F32, load)


def _zeros(width: int) -> Tensor:
    return torch.zeros(1, width)


def _type_of(row: Row, hparams: ReLULlama, dtype: str) -> GGMLQuantizationType:
    if len(row.shape) == 1:
        return GGMLQuantizationType.F32
    heads = {"output.weight", *(["token_embd.weight"] if hparams.tied else [])}
    if dtype == "q4_0" and row.target in heads:
        return GGMLQuantizationType.Q8_0
    return GGMLQuantizationType[dtype.upper()]
