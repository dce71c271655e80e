"""What a bundle must look like, checked on the file alone: values and folders.

The tables in metadata.py and tensors.py are written from PowerInfer's llama.cpp a second time and
share nothing with the exporter's: one table for both would confirm its own mistakes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sparsecast.export.header import header_of
from sparsecast.export.reader import GGUFFile
from sparsecast.export.traffic import traffic_of
from sparsecast.predictors.checkpoint import PredictorSet
from sparsecast.predictors.manifest import PredictorManifest


@dataclass(frozen=True)
class Check:
    """One line of the result."""

    name: str
    ok: bool
    detail: str


def check_finite(file: GGUFFile) -> Check:
    """No NaN and no infinity in any tensor."""
    wrong = [name for name in file.entries if not bool(file.tensor(name).isfinite().all())]
    detail = f"NaN or infinity in {', '.join(wrong)}" if wrong else "no NaN, no infinity"
    return Check("finite", not wrong, detail)


def check_predictor_folder(file: GGUFFile, predictors: PredictorSet) -> Check:
    """predictor/ says what the file says: fc1, fc2 and the threshold."""
    wrong = []
    layers = header_of(file).layers
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


def check_traffic(file: GGUFFile, manifest: PredictorManifest | None) -> list[Check]:
    """What the file's predictors save, by their own scores; nothing where they have none."""
    if manifest is None or len(manifest.calibration) != header_of(file).layers:
        return []
    stored = {name: (entry.type.name, entry.shape) for name, entry in file.entries.items()}
    return [Check("traffic", True, str(traffic_of(stored, manifest.calibration)))]


def check_activation_folder(file: GGUFFile, folder: Path) -> Check:
    """activation_<i>.pt per layer, 1-D float32 or float64 of the FFN's width, counts."""
    if not folder.exists():
        return Check("hot and cold", True, "no activation folder: exported without activations")
    wrong = []
    header = header_of(file)
    layers, width = header.layers, header.ffn
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
