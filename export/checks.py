"""What a llama bundle must look like, checked on the file alone: header and folders.

The tables here and in tensors.py are written from PowerInfer's llama.cpp a second time and share
nothing with the exporter's: one table for both would confirm its own mistakes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsecast.collect.errors import InputError
from sparsecast.export.reader import FLOAT32, STRING, UINT32, GGUFFile
from sparsecast.export.traffic import traffic_of
from sparsecast.predictors.checkpoint import load_predictors


@dataclass(frozen=True)
class Check:
    """One line of the result."""

    name: str
    ok: bool
    detail: str


COUNTS = (
    "llama.context_length",
    "llama.embedding_length",
    "llama.block_count",
    "llama.feed_forward_length",
    "llama.attention.head_count",
)
REQUIRED = {
    "general.architecture": STRING,
    **dict.fromkeys(COUNTS, UINT32),
    "llama.attention.layer_norm_rms_epsilon": FLOAT32,
    "powerinfer.sparse_threshold": FLOAT32,
    "tokenizer.ggml.model": STRING,
}
OPTIONAL = {
    "llama.attention.head_count_kv": UINT32,
    "llama.rope.dimension_count": UINT32,
    "llama.rope.freq_base": FLOAT32,
    "llama.rope.scaling.type": STRING,
    "llama.rope.scaling.factor": FLOAT32,
    "general.file_type": UINT32,
    "general.quantization_version": UINT32,
    **{f"tokenizer.ggml.{kind}_token_id": UINT32 for kind in ("bos", "eos", "unknown", "padding")},
}


def check_metadata(file: GGUFFile) -> Check:
    """Magic, keys and their types; what the engine would refuse, misread or never notice."""
    keys: dict[str, Any] = file.keys
    wrong = [] if file.magic == b"PWRI" else [f"magic is {file.magic!r}, expected b'PWRI'"]
    if file.alignment != 32:
        wrong.append(f"alignment is {file.alignment}, expected 32")
    wrong += [f"{key} is missing" for key in REQUIRED if key not in keys]
    for key, kind in {**REQUIRED, **OPTIONAL}.items():
        if key in keys and file.key_types[key] != kind:
            wrong.append(f"{key} has value type {file.key_types[key]}, expected {kind}")
    if wrong:
        return Check("metadata", False, "; ".join(wrong))
    wrong += [f"{key} is 0" for key in COUNTS if not keys[key]]
    if keys["llama.block_count"] > len(file.entries):
        wrong.append(
            f"llama.block_count is {keys['llama.block_count']}, more than there are tensors"
        )
    if keys["general.architecture"] != "llama":
        wrong.append(f"general.architecture is {keys['general.architecture']!r}, expected 'llama'")
    if (kind := keys["tokenizer.ggml.model"]) not in ("llama", "gpt2"):
        wrong.append(f"tokenizer.ggml.model is {kind!r}, expected 'llama' or 'gpt2'")
    if keys["llama.feed_forward_length"] <= 1000:
        wrong.append("the FFN is not wider than 1000: the engine ignores the threshold")
    if not wrong:
        wrong += _wrong_heads(keys)
    rope = keys.get("llama.rope.scaling.type", "none")
    if rope not in ("none", "linear"):
        wrong.append(f"llama.rope.scaling.type is {rope!r}, expected none or linear")
    return Check("metadata", not wrong, "; ".join(wrong) or f"{len(keys)} keys")


def _wrong_heads(keys: dict[str, Any]) -> list[str]:
    hidden, heads = keys["llama.embedding_length"], keys["llama.attention.head_count"]
    kv_heads = keys.get("llama.attention.head_count_kv", heads)
    if hidden % heads or not kv_heads or heads % kv_heads:
        return [f"{heads} heads and {kv_heads} key/value heads do not fit hidden size {hidden}"]
    if keys.get("llama.rope.dimension_count", hidden // heads) != hidden // heads:
        return ["llama.rope.dimension_count is not the head size"]
    return []


def check_finite(file: GGUFFile) -> Check:
    """No NaN and no infinity in any tensor."""
    wrong = [name for name in file.entries if not bool(file.tensor(name).isfinite().all())]
    detail = f"NaN or infinity in {', '.join(wrong)}" if wrong else "no NaN, no infinity"
    return Check("finite", not wrong, detail)


def check_predictor_folder(file: GGUFFile, folder: Path) -> Check:
    """predictor/ says what the file says: fc1, fc2 and the threshold."""
    try:
        predictors = load_predictors(folder)
    except InputError as error:
        return Check("predictor folder", False, str(error))
    wrong = []
    layers = file.keys["llama.block_count"]
    if len(predictors.layers) != layers:
        wrong.append(f"{len(predictors.layers)} predictors for {layers} layers")
    for i, predictor in enumerate(predictors.layers[:layers]):
        for short, weight in zip(("fc1", "fc2"), predictor.weights, strict=True):
            name = f"blk.{i}.{short}.weight"
            stored = file.entries[name].type
            if stored.name != predictor.dtype:
                wrong.append(f"{name} is {stored.name}, manifest.json has {predictor.dtype}")
            elif not same(file.tensor(name), weight.to(stored.dtype)):
                wrong.append(f"{name} differs from model_{i}.pt")
    threshold = file.keys["powerinfer.sparse_threshold"]
    if torch.tensor(predictors.threshold, dtype=torch.float32).item() != threshold:
        wrong.append(f"threshold is {threshold:g}, config.json has {predictors.threshold:g}")
    return Check("predictor folder", not wrong, "; ".join(wrong) or f"{layers} predictors equal")


def check_traffic(file: GGUFFile, folder: Path) -> list[Check]:
    """What the file's predictors save, by their own scores; nothing where they have none."""
    try:
        manifest = load_predictors(folder).manifest
    except InputError:
        return []
    if manifest is None or len(manifest.calibration) != file.keys["llama.block_count"]:
        return []
    stored = {name: (entry.type.name, entry.shape) for name, entry in file.entries.items()}
    return [Check("traffic", True, str(traffic_of(stored, manifest.calibration)))]


def check_activation_folder(file: GGUFFile, folder: Path) -> Check:
    """activation_<i>.pt per layer, 1-D float32 or float64 of the FFN's width, counts."""
    if not folder.is_dir():
        return Check("hot and cold", True, "no activation folder: exported without activations")
    wrong = []
    layers, width = file.keys["llama.block_count"], file.keys["llama.feed_forward_length"]
    names = {f"activation_{i}.pt" for i in range(layers)}
    if odd := names ^ {path.name for path in folder.iterdir()}:
        wrong.append(f"{', '.join(sorted(odd))} missing or not expected")
    for name in sorted(names):
        if not (folder / name).is_file():
            continue
        try:
            counts = torch.load(folder / name, map_location="cpu", weights_only=True)
        except Exception as error:  # torch and pickle raise many kinds for a damaged file
            wrong.append(f"{name} cannot be read ({type(error).__name__})")
            continue
        if not isinstance(counts, Tensor) or counts.dtype not in (torch.float32, torch.float64):
            wrong.append(f"{name} is no float32 or float64 tensor")
        elif counts.shape != (width,):
            wrong.append(f"{name} has shape {tuple(counts.shape)}, expected ({width},)")
        elif not bool((counts >= 0).all()) or not bool(counts.isfinite().all()):
            wrong.append(f"{name} holds values that are no counts")
    return Check("hot and cold", not wrong, "; ".join(wrong) or f"{layers} files")


def same(a: Tensor, b: Tensor) -> bool:
    """Equal in shape and value; -0 equals 0, NaN equals nothing."""
    return a.shape == b.shape and torch.equal(a, b)
