"""Read and write a predictor folder, laid out as PowerInfer's converter reads it.

model_<i>.pt    {"fc1.weight": (R, D), "fc2.weight": (F, R)}, one per layer, no gaps: f16, or the
                dequantized values of q8_0 and q4_0 in f32
                in a mixture of experts model_<i>_<e>.pt, one per layer and expert
config.json     {"sparse_threshold": t}: active where logit >= t
manifest.json   what PowerInfer does not need (manifest.py): the model's fingerprint, where the
                input is taken, formats, calibration scores, the recipe, every file's checksum
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sparsecast.core.errors import InputError
from sparsecast.core.files import new_folder, read_json, unreadable_error, write_json
from sparsecast.core.folders import check_folder_kind
from sparsecast.core.ggml_blocks import BLOCK
from sparsecast.core.hub import local_folder
from sparsecast.core.manifests import MANIFEST
from sparsecast.core.models.ffns import place_of
from sparsecast.core.options import short_repr
from sparsecast.core.run_record import Run
from sparsecast.core.torch_files import describe_unless_floats, load_torch, save_torch
from sparsecast.predictors.formats import rounded
from sparsecast.predictors.manifest import (
    CONFIG,
    PredictorManifest,
    check_checksum,
    number,
    read_manifest,
    write_predictor_manifest,
)
from sparsecast.predictors.predictor import Predictor

SLAB = 2**18
"""Weights that are compared at once."""
WANT = 'a dict with exactly "fc1.weight" (R, D) and "fc2.weight" (F, R), no biases'


@dataclass(frozen=True)
class PredictorSet:
    """The predictors of all layers and their common threshold."""

    layers: list[Predictor]
    """In a mixture of experts one for each expert, layer by layer."""
    threshold: float
    manifest: PredictorManifest | None
    """None if another tool wrote the folder."""

    @property
    def experts(self) -> int:
        """Experts per layer; 0 in a dense model."""
        return 0 if self.manifest is None else self.manifest.experts

    @property
    def layer_count(self) -> int:
        """Layers that the predictors are for."""
        return len(self.layers) // max(1, self.experts)

    @property
    def nbytes(self) -> int:
        """Size of all matrices in PowerInfer's file."""
        return sum(layer.nbytes for layer in self.layers)

    def save(self, folder: Path, run: Run | None = None) -> None:
        """Write the folder in one step, replacing an earlier predictor folder.

        Args:
            run: The training, which run.json then describes.
        """
        with new_folder(folder, replaces=model_file(0, self.experts)) as part:
            self.write_into(part)
            if run is not None:
                run.write(part)

    def write_into(self, folder: Path) -> None:
        """Write the files into an existing folder."""
        for i, predictor in enumerate(self.layers):
            save_torch(state_of_file(predictor), folder / model_file(i, self.experts))
        write_json(folder / CONFIG, {"sparse_threshold": self.threshold})
        if self.manifest is not None:
            files = (model_file(i, self.experts) for i in range(len(self.layers)))
            names = [CONFIG, *files]
            write_predictor_manifest(folder, self.manifest, names)


def state_of_file(predictor: Predictor) -> dict[str, Tensor]:
    """Return what a predictor's file holds. Memory: the weights, in the file's dtype, twice."""
    stored = predictor.stored()
    weights = {"fc1.weight": stored.fc1_RD, "fc2.weight": stored.fc2_FR}
    # Clone, because saving a view would save its whole base.
    return {
        name: w.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, w in weights.items()
    }


def load_predictors(folder: str | Path) -> PredictorSet:
    """Read a predictor folder, written by `sparsecast train` or published by PowerInfer.

    A hub id, `owner/name` or `owner/name@revision`, is downloaded unless a folder here has that
    name.

    Files are compared with their checksums in the manifest, if there is one.

    Memory: none for files that `PredictorSet` wrote, which stay memory maps; other dtypes are
    converted.

    Raises:
        InputError: No predictors there or on the hub, a missing layer, a file that differs from its
            checksum, or one that does not hold two finite matrices that fit together.
    """
    folder = local_folder(folder, "predictors")
    n_layers = _layers(folder)
    manifest = read_manifest(folder)
    if not n_layers:
        if manifest is None or not manifest.experts:
            raise InputError(
                f"{folder}: holds predictors of experts, but no manifest.json that says how many a "
                "layer has; copy the whole folder again"
            )
        n_layers = len(manifest.ranks)
    threshold = _threshold(folder / CONFIG, manifest)
    dtypes = ["f16"] * n_layers if manifest is None else manifest.dtypes
    if len(dtypes) != n_layers:
        raise InputError(
            f"{folder}: holds predictors for {n_layers} layers, but manifest.json is of "
            f"{len(dtypes)}; copy the whole folder again"
        )
    layers = []
    for i, dtype in enumerate(dtypes):
        path = folder / model_file(i, 0 if manifest is None else manifest.experts)
        check_checksum(path, manifest)
        layers.append(_read(path, dtype))
    if manifest is not None:
        _check_shapes(layers, manifest, folder)
    return PredictorSet(layers, threshold, manifest)


def sizes_on_disk(nbytes: int, folder: Path) -> str:
    """The size of predictors in PowerInfer's file and in their own folder, in words.

    Args:
        nbytes: See `PredictorSet.nbytes`.
        folder: Holds model_*.pt, which keep quantized values in float32.
    """
    files = sum(path.stat().st_size for path in folder.glob("model_*.pt"))
    exported, own = (f"{count / 2**20:,.2f} MiB" for count in (nbytes, files))
    name = "model_<i>_<e>.pt" if any(folder.glob("model_*_*.pt")) else "model_<i>.pt"
    return f"{exported} in PowerInfer's file ({own} as {name})"


def model_file(ffn: int, experts: int = 0) -> str:
    """The name of the file of a layer, or of an expert; see core/models/ffns.py."""
    layer, expert = place_of(ffn, experts)
    return f"model_{layer}.pt" if expert is None else f"model_{layer}_{expert}.pt"


def _layers(folder: Path) -> int:
    """Count the layers by the folder's file names, and refuse gaps; 0 for predictors of experts,
    which a manifest counts."""
    want = "a folder written by `sparsecast train` or one of PowerInfer's predictor repositories"
    try:
        names = os.listdir(folder)
    except OSError as error:
        if isinstance(error, NotADirectoryError) and os.path.lexists(folder):
            check_folder_kind(folder, "predictors")
            raise InputError(f"{folder}: is no folder, expected {want}") from error
        raise unreadable_error(folder, error, want) from error
    pattern = re.compile(r"model_(0|[1-9][0-9]*)\.pt")
    found = {int(m[1]) for name in names if (m := pattern.fullmatch(name))}
    if not found and any(re.fullmatch(r"model_\d+_\d+\.pt", name) for name in names):
        return 0
    if not found:
        check_folder_kind(folder, "predictors")
        raise InputError(f"{folder}: no model_0.pt in it, expected {want}")
    missing = next((i for i in range(len(found)) if i not in found), None)
    if missing is not None:
        raise InputError(f"{folder}: {model_file(missing)} is missing; train again or copy it here")
    return len(found)


def _threshold(path: Path, manifest: PredictorManifest | None) -> float:
    """Read sparse_threshold; 0 if a folder of another tool does not have it."""
    if manifest is None and not os.path.lexists(path):
        return 0.0
    value = read_json(path, "sparse_threshold").get("sparse_threshold", 0.0)
    check_checksum(path, manifest)
    if (threshold := number(value)) is None:
        raise InputError(
            f"{path}: sparse_threshold is {short_repr(value)}, expected a number that float32 "
            "holds, as PowerInfer's file has it; correct it, or copy the folder again"
        )
    return threshold


def _read(path: Path, dtype: str) -> Predictor:
    value = load_torch(path, f"a torch file with {WANT}", f"expected {WANT}")
    if not isinstance(value, dict) or set(value) != {"fc1.weight", "fc2.weight"}:
        keys = sorted(map(str, value)) if isinstance(value, dict) else type(value).__name__
        raise InputError(f"{path}: holds {short_repr(keys)}, expected {WANT}")
    for name in ("fc1.weight", "fc2.weight"):
        if (odd := describe_unless_floats(value[name])) is not None:
            raise InputError(
                f"{path}: {name} is {odd}, expected a dense tensor of f16, bf16, f32 or f64; save "
                "it again as one, or train again"
            )
    # Accept parameters, and matrices that are transposed in the file.
    fc1, fc2 = (value[name].detach().contiguous() for name in ("fc1.weight", "fc2.weight"))
    if fc1.dim() != 2 or fc2.dim() != 2 or fc1.shape[0] != fc2.shape[1] or not fc1.numel():
        raise InputError(
            f"{path}: fc1.weight {tuple(fc1.shape)} and fc2.weight {tuple(fc2.shape)} do not fit; "
            f"expected {WANT}"
        )
    if not (fc1.isfinite().all() and fc2.isfinite().all()):
        raise InputError(f"{path}: holds NaN or infinity; train again")
    return _as_stored(path, fc1, fc2, dtype)


def _as_stored(path: Path, fc1: Tensor, fc2: Tensor, dtype: str) -> Predictor:
    """Check the weights against the format that the manifest names."""
    if dtype == "f16":
        predictor = Predictor(fc1, fc2).stored()
        if not all(bool(weight.isfinite().all()) for weight in predictor.weights):
            raise InputError(
                f"{path}: holds values beyond 65504, which f16 cannot store; scale fc1 down and "
                "fc2 up"
            )
        return predictor
    if fc1.shape[0] % BLOCK or fc1.shape[1] % BLOCK:
        raise InputError(
            f"{path}: manifest.json says {dtype}, whose rows lie in blocks of {BLOCK}, but fc1 is "
            f"{tuple(fc1.shape)}; train again"
        )
    if not (_holds(fc1, dtype) and _holds(fc2, dtype)):
        raise InputError(
            f"{path}: manifest.json says {dtype}, but {dtype} cannot hold these values; train again"
        )
    return Predictor(fc1.float(), fc2.float(), dtype)


def _holds(weight_NK: Tensor, dtype: str) -> bool:
    """Return whether a format holds every weight as it is, a slab of rows at a time."""
    slabs = torch.split(weight_NK.float(), max(1, SLAB // weight_NK.shape[1]))
    return all(torch.equal(rounded(slab, dtype), slab) for slab in slabs)


def _check_shapes(layers: list[Predictor], manifest: PredictorManifest, folder: Path) -> None:
    for i, layer in enumerate(layers):
        found = (layer.rank, layer.fc1_RD.shape[1], layer.fc2_FR.shape[0])
        if found != (want := (manifest.ranks[i], manifest.hidden_size, manifest.ffn_width)):
            raise InputError(
                f"{folder / model_file(i, manifest.experts)}: rank, hidden size and FFN width are "
                f"{found}, but {MANIFEST} says {want}; copy the whole folder again"
            )
