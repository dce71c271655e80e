"""What a bundle must look like, checked on the file alone: values and folders.

The tables in metadata.py and tensors.py are written from PowerInfer's llama.cpp a second time and
share nothing with the exporter's: one table for both would confirm its own mistakes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sparsecast.core.errors import InputError
from sparsecast.core.files import check_file
from sparsecast.core.torch_files import describe_unless_floats, load_torch
from sparsecast.export.read.header import header_of
from sparsecast.export.read.reader import GGUFFile
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
    source = "manifest.json has" if predictors.manifest else "without a manifest.json it counts as"
    layers = header_of(file).layers
    if len(predictors.layers) != layers:
        wrong.append(f"{len(predictors.layers)} predictors for {layers} layers")
    for i, predictor in enumerate(predictors.layers[:layers]):
        for short, weight in zip(("fc1", "fc2"), predictor.weights, strict=True):
            name = f"blk.{i}.{short}.weight"
            stored = file.entries[name].type
            if stored.name != predictor.dtype:
                wrong.append(f"{name} is {stored.name}, {source} {predictor.dtype}")
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
    if not os.path.lexists(folder):
        return Check("hot and cold", True, "no activation folder: exported without activations")
    try:
        there = set(os.listdir(folder))
    except OSError as error:
        detail = f"{folder}: expected a folder with the activation counts ({error.strerror})"
        return Check("hot and cold", False, detail)
    wrong = []
    header = header_of(file)
    names = [f"activation_{i}.pt" for i in range(header.layers)]
    if odd := set(names) ^ there:
        wrong.append(f"{', '.join(sorted(odd))} missing or not expected")
    for name in names:
        if name not in there:
            continue
        try:
            read_counts(folder / name, header.ffn)
        except InputError as error:
            wrong.append(str(error).removeprefix(f"{folder}{os.sep}"))
    return Check("hot and cold", not wrong, "; ".join(wrong) or f"{header.layers} files")


def check_card(folder: Path) -> list[Check]:
    """One check where README.md is there and is no file, such as a folder; none where it is."""
    path = folder / "README.md"
    if not os.path.lexists(path):
        return []
    try:
        check_file(path, "the bundle's card")
    except InputError as error:
        return [Check("card", False, str(error))]
    return []


def read_counts(path: Path, width: int) -> Tensor:
    """(F,) float32 or float64: how often each neuron of a layer fired.

    Raises:
        InputError: The file is damaged, or holds something else.
    """
    expected = f"a tensor of {width} counts"
    counts = load_torch(path, f"a torch file with {expected}", f"expected {expected}")
    odd = describe_unless_floats(counts)
    if odd is not None or counts.dtype not in (torch.float32, torch.float64):
        raise InputError(f"{path}: is no float32 or float64 tensor ({odd or counts.dtype})")
    if counts.shape != (width,):
        raise InputError(f"{path}: has shape {tuple(counts.shape)}, expected ({width},)")
    if not bool((counts >= 0).all()) or not bool(counts.isfinite().all()):
        raise InputError(f"{path}: holds values that are no counts")
    kept: Tensor = counts.detach()
    return kept


def same(a: Tensor, b: Tensor) -> bool:
    """Equal in shape and value; -0 equals 0, NaN equals nothing."""
    return a.shape == b.shape and torch.equal(a, b)
