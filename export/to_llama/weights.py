"""Write a LLaMA's weights as safetensors, in shards of `SHARD` bytes with an index.

A safetensors file is the length of its header as 8 bytes, little endian, the header as JSON (name,
dtype, shape, place of the data of each tensor), and the data. So it can be written a slab of rows
at a time, and memory is one slab whatever the size of a tensor. Names of shards and index are
huggingface_hub's.

Products are float32, rounded once more to the stored dtype (core/models/scales.py).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from sparsecast.core.errors import InputError
from sparsecast.core.files import write_json
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.scales import folded
from sparsecast.export.to_llama.plan import FoldedTensor

SHARD = 5 * 10**9
"""Most bytes of a shard; a larger tensor has one of its own."""
SLAB = 2**20
"""Weights that are converted together; a single row where it holds more."""
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


def write_weights(
    folder: Path,
    checkpoint: Checkpoint,
    tensors: list[FoldedTensor],
    wrote: Callable[[int], Any] = lambda nbytes: None,
) -> None:
    """Write model.safetensors, or its shards and their index, into a folder.

    Args:
        wrote: Called with the bytes of each slab.

    Raises:
        InputError: NaN or infinity in the model, or a product that its dtype cannot hold.
        OSError: The disk is full.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    split = split_state_dict_into_shards_factory(
        by_name,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD,
    )
    for name, members in split.filename_to_tensors.items():
        _write_file(folder / name, checkpoint, [by_name[member] for member in members], wrote)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def _write_file(
    path: Path,
    checkpoint: Checkpoint,
    tensors: list[FoldedTensor],
    wrote: Callable[[int], Any],
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for tensor in tensors:
        ends = [place, place := place + tensor.nbytes]
        kind = {"dtype": DTYPES[tensor.dtype], "shape": tensor.shape}
        header[tensor.name] = {**kind, "data_offsets": ends}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            for rows in _slabs(checkpoint, tensor):
                file.write(rows.view(torch.uint8).numpy().data)
                wrote(rows.nbytes)
        file.flush()
        os.fsync(file.fileno())


def _slabs(checkpoint: Checkpoint, tensor: FoldedTensor) -> Iterator[Tensor]:
    """Yield a tensor's rows, folded and in its dtype, contiguous."""
    for rows in split_rows(checkpoint.tensor(tensor.source)):
        made = folded(rows, tensor.factor).to(tensor.dtype).contiguous()
        if not all(extreme.isfinite() for extreme in made.aminmax()):
            raise _not_finite(checkpoint, tensor, rows)
        yield made


def split_rows(weight: Tensor) -> Iterator[Tensor]:
    """Yield slabs of at most `SLAB` values along the first axis."""
    yield from torch.split(weight, max(1, SLAB // max(1, weight[0].numel())))


def _not_finite(checkpoint: Checkpoint, tensor: FoldedTensor, rows: Tensor) -> InputError:
    kind = str(tensor.dtype).removeprefix("torch.")
    if not bool(rows.isfinite().all()):
        return InputError(
            f"{checkpoint.folder}: {tensor.source} holds NaN or infinity, expected finite weights; "
            "download or save the weights again"
        )
    return InputError(
        f"{checkpoint.folder}: {tensor.source} holds {rows.abs().max().item():g}, which times "
        f"{tensor.factor:g} is beyond {kind}; save the model in bfloat16 or float32 first"
    )
