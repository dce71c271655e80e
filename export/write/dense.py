"""Write a bundle's model as a dense GGUF, which the same engine runs without predictors.

Types, tensors and header stay, except for the magic, the down projection, which is transposed back,
and fc1 and fc2, which are dropped. The engine computes SiLU in every dense llama, as llama.cpp
does, so such a file takes the time of the dense model but does not generate its text.

Memory: the largest tensor twice, in float32 where it is quantized.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
from gguf.quants import quantize

from sparsecast.core.errors import InputError
from sparsecast.export.read.reader import ARRAY, GGUFFile

DOWN = "ffn_down_t.weight"
LEFT_OUT = ("general.architecture", "general.alignment")
"""Keys that the writer adds by itself."""


def write_dense(bundle: GGUFFile, path: Path, arch: str | None = None) -> None:
    """Write the dense file; `path` is replaced.

    Args:
        arch: The architecture that the file names instead of the bundle's: llama.cpp has no bamboo,
            whose tensors are a llama's.

    Raises:
        InputError: The file is dense already, or its FFN width does not divide into the blocks of
            a quantized row.
    """
    if bundle.magic != b"PWRI":
        raise InputError(f"{bundle.path}: is a dense GGUF, expected a PowerInfer file")
    writer = GGUFWriter(path, arch or str(bundle.keys["general.architecture"]))
    _add_keys(writer, bundle)
    kept = [name for name in bundle.entries if ".fc1." not in name and ".fc2." not in name]
    for name in kept:
        entry, target = bundle.entries[name], name.replace("ffn_down_t", "ffn_down")
        shape = entry.shape
        if name.endswith(DOWN):
            shape = shape[::-1]
            if shape[1] % entry.type.block:
                raise InputError(
                    f"{bundle.path}: rows of a dense down projection are {shape[1]} wide, which "
                    f"does not divide into the blocks of {entry.type.block} of {entry.type.name}; "
                    "compare a bundle in f16"
                )
        writer.add_tensor_info(
            target,
            list(shape),
            np.dtype(np.float32),
            entry.nbytes,
            raw_dtype=GGMLQuantizationType[entry.type.name.upper()],
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    file = writer.fout[0]
    writer.write_padding(file, file.tell())
    for name in kept:
        file.write(_stored(bundle, name).data)
        writer.write_padding(file, bundle.entries[name].nbytes)
    writer.close()


def _add_keys(writer: GGUFWriter, bundle: GGUFFile) -> None:
    own = f"{bundle.keys['general.architecture']}."
    for key, value in bundle.keys.items():
        if key in LEFT_OUT or key.startswith("powerinfer."):
            continue
        named = f"{writer.arch}.{key.removeprefix(own)}" if key.startswith(own) else key
        is_array = bundle.key_types[key] == ARRAY
        value_type = GGUFValueType(bundle.key_types[key])
        writer.add_key_value(named, value, value_type, _element(value) if is_array else None)


def _element(values: list[Any]) -> GGUFValueType:
    if values and isinstance(values[0], str):
        return GGUFValueType.STRING
    whole = bool(values) and isinstance(values[0], int)
    return GGUFValueType.INT32 if whole else GGUFValueType.FLOAT32


def _stored(bundle: GGUFFile, name: str) -> np.ndarray[Any, Any]:
    entry = bundle.entries[name]
    values = bundle.tensor(name)
    if name.endswith(DOWN):
        values = values.T
    if entry.type.block == 1:
        array: np.ndarray[Any, Any] = values.contiguous().numpy()
        return array
    kind = GGMLQuantizationType[entry.type.name.upper()]
    return np.ascontiguousarray(quantize(values.to(torch.float32).contiguous().numpy(), kind))
