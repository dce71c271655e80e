"""Show what a PWRI, GGUF or gpuidx file holds: keys, tensors, and the neurons of a split."""

from __future__ import annotations

import re
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from sparsecast.core.disk import format_bytes
from sparsecast.core.errors import InputError
from sparsecast.core.messages import log, show
from sparsecast.export.bundle import GPUIDX_SUFFIX
from sparsecast.export.read.reader import Entry, GGUFFile

SPLIT = "generic.gpu_index"
"""The architecture that a gpuidx file names."""
ROWS = ("ffn_gate", "ffn_up", "ffn_down_t")
INDEX_BYTES = 4
"""A neuron on the GPU takes its rows of these matrices and its number, an i32."""
SHORT_ARRAY = 8
SHOWN = 1000
"""Most rows of a table on the screen; the JSON has all."""
SHORT_TEXT = 100


def file_values(path: Path) -> dict[str, Any]:
    """Return what the file holds, without the tensors' values and long arrays.

    Raises:
        InputError: Not such a file, truncated or damaged.
    """
    file = GGUFFile(path)
    values: dict[str, Any] = {
        "kind": "gpu split" if file.keys.get("general.architecture") == SPLIT else "model",
        "path": str(path),
        "what": _what(file),
        "magic": file.magic.decode(),
        "version": file.version,
        "alignment": file.alignment,
        "bytes": path.stat().st_size,
        "keys": {key: _value(value) for key, value in file.keys.items()},
        "tensors": [
            {"name": name, "shape": list(e.shape), "type": e.type.name, "bytes": e.nbytes}
            for name, e in file.entries.items()
        ],
    }
    if values["kind"] == "gpu split":
        values["layers"] = _layers(file)
    return values


def _what(file: GGUFFile) -> str:
    """Say what the file is and which program it is for."""
    arch = file.keys.get("general.architecture")
    if arch == SPLIT:
        return "the neurons that a GPU build of PowerInfer keeps on the GPU"
    if file.magic == b"PWRI":
        return f"a model of architecture {arch} with predictors, for PowerInfer"
    if arch == "smallthinker" and file.keys.get("smallthinker.expert_count") == 1:
        return "a llama with ReLU as a SmallThinker with one expert, for llama.cpp, no predictors"
    return f"a GGUF of architecture {arch} without predictors"


def _value(value: Any) -> Any:
    """Convert a value for JSON; a long array becomes its length."""
    if isinstance(value, (list, np.ndarray)):
        if len(value) > SHORT_ARRAY:
            return {"length": len(value)}
        return [_value(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def _layers(split: GGUFFile) -> list[dict[str, Any]]:
    """Count each layer's neurons on the GPU, and their bytes if the model is beside the split."""
    matrices = _matrices(split.path)
    rows = []
    for name, entry in split.entries.items():
        if not (found := re.fullmatch(r"blk\.(\d{1,9})\.gpu_bucket", name)):
            continue
        layer, neurons = int(found[1]), entry.shape[0]
        index = split.entries.get(f"blk.{layer}.gpu_idx")
        here = [matrices.get(f"blk.{layer}.{row}.weight") for row in ROWS]
        sizes = [e.nbytes // e.shape[0] for e in here if e is not None and e.shape[0]]
        rows.append(
            {
                "layer": layer,
                "neurons": neurons,
                "width": index.shape[0] if index is not None else None,
                "bytes": neurons * (sum(sizes) + INDEX_BYTES) if sizes else None,
            }
        )
    return rows


def _matrices(path: Path) -> dict[str, Entry]:
    try:
        return GGUFFile(path.with_name(path.name.removesuffix(GPUIDX_SUFFIX))).entries
    except InputError:
        return {}


def show_file(values: dict[str, Any]) -> None:
    """Show the file's keys, and its tensors or, for a split, its layers."""
    log.info(values["path"], extra={"style": "bold"})
    head = f"{values['magic']} version {values['version']}, alignment {values['alignment']}"
    log.info(f"  {head}, {format_bytes(values['bytes'])}")
    log.info(f"  {plain(values['what'])}")
    keys = Table(title="keys", title_justify="left", show_header=False)
    for key, value in list(values["keys"].items())[:SHOWN]:
        keys.add_row(plain(key), _short(value))
    show(keys)
    _log_more(len(values["keys"]), "keys")
    show(_split_table(values) if "layers" in values else _tensor_table(values))
    _log_more(len(values["tensors"]), "tensors")


def _log_more(count: int, what: str) -> None:
    if count > SHOWN:
        log.info(f"and {count - SHOWN:,} more {what}, see --json")


def _tensor_table(values: dict[str, Any]) -> Table:
    tensors = values["tensors"]
    total = format_bytes(sum(tensor["bytes"] for tensor in tensors))
    table = Table(title=f"{len(tensors)} tensors, {total}", title_justify="left")
    table.add_column("name", overflow="fold")
    for name in ("shape", "type", "bytes"):
        table.add_column(name, justify="right")
    for tensor in tensors[:SHOWN]:
        shape = " x ".join(map(str, tensor["shape"]))
        table.add_row(plain(tensor["name"]), shape, tensor["type"], f"{tensor['bytes']:,}")
    return table


def _split_table(values: dict[str, Any]) -> Table:
    layers = values["layers"]
    total = sum(layer["neurons"] for layer in layers)
    table = Table(title=f"{total:,} neurons on the GPU", title_justify="left")
    for name in ("layer", "neurons", "of", "bytes"):
        table.add_column(name, justify="right")
    for layer in layers[:SHOWN]:
        shown = ("?" if v is None else f"{v:,}" for v in (layer["width"], layer["bytes"]))
        table.add_row(str(layer["layer"]), f"{layer['neurons']:,}", *shown)
    return table


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['length']:,} values"
    text = plain(value) if isinstance(value, str) else str(value)
    return text if len(text) <= SHORT_TEXT else f"{text[:SHORT_TEXT]}... ({len(text):,} characters)"


def plain(text: str) -> str:
    """Escape a text with control characters."""
    return text if text.isprintable() else repr(text)
