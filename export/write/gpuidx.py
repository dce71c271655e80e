"""Write a split as the gpuidx file that a GPU build of PowerInfer reads beside its model.

<model file>.generated.gpuidx has the layout of a GGUF version 3 file with the magic "PWRI" (see
export/read/reader.py), alignment 32:

    general.architecture            string "generic.gpu_index"
    generic.gpu_index.block_count   u32    layers
    split.vram_capacity             u64    bytes that must be free for neurons
    blk.<i>.gpu_idx                 (F,) i32   1 on the GPU, 0 on the CPU
    blk.<i>.gpu_bucket              (K,) i32   the neurons with 1, ascending; K may be 0

The engine reads tensors by position, two per layer from layer 0 on. PowerInfer's own exporter sorts
the counts' file names as strings, so from 11 layers on it gives layer 2 the neurons of layer 10.
Here split.vram_capacity is the bytes that the neurons take. PowerInfer instead writes the bytes
that were free when it made the file, and makes the file again wherever fewer are free. i32 has type
id 18, as in ggml at that time.
(powerinfer-py/export_split.py and `llama_gpu_split_loader` of llama.cpp at d3ebd7c.)

Shape letters: F FFN width, K neurons on the GPU.
"""

from __future__ import annotations

import struct
from pathlib import Path

import torch
from torch import Tensor

from sparsecast.export.write.hot_cold import Split

ARCHITECTURE = "generic.gpu_index"
KEY_BLOCKS = "generic.gpu_index.block_count"
KEY_CAPACITY = "split.vram_capacity"
ALIGNMENT = 32
_UINT32, _STRING, _UINT64 = 4, 8, 10
_I32 = 18


def write_gpuidx(path: Path, split: Split) -> None:
    """Write the file, a few bytes per neuron."""
    tensors: list[tuple[str, Tensor]] = []
    for i, hot_K in enumerate(split.hot):
        index_F = torch.zeros(split.width, dtype=torch.int32)
        index_F[hot_K] = 1
        tensors += [(f"blk.{i}.gpu_idx", index_F), (f"blk.{i}.gpu_bucket", hot_K.int())]
    keys = (
        _text("general.architecture") + struct.pack("<I", _STRING) + _text(ARCHITECTURE),
        _text(KEY_BLOCKS) + struct.pack("<II", _UINT32, len(split.hot)),
        _text(KEY_CAPACITY) + struct.pack("<IQ", _UINT64, split.nbytes),
    )
    header = [b"PWRI", struct.pack("<IQQ", 3, len(tensors), len(keys)), *keys]
    data: list[bytes] = []
    offset = 0
    for name, values in tensors:
        header += [_text(name), struct.pack("<IQIQ", 1, len(values), _I32, offset)]
        data.append(_padded(values.numpy().astype("<i4").tobytes()))
        offset += len(data[-1])
    path.write_bytes(_padded(b"".join(header)) + b"".join(data))


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def _padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % ALIGNMENT)
