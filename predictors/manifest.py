"""manifest.json of a predictor folder: the model the predictors belong to, and checksums.

Checksums detect accidents, not tampering (core/manifests.py); `sparsecast verify` measures what the
predictors do.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import Any

import xxhash

from sparsecast.core.errors import InputError
from sparsecast.core.files import check_file, read_json, unreadable_error
from sparsecast.core.manifests import (
    MANIFEST,
    check_keys,
    check_version,
    find_edit,
    is_checksums,
    is_count,
    is_shallow,
    is_text,
    optional,
    write_manifest,
)
from sparsecast.core.models.activations import ActivationRule
from sparsecast.core.models.shape import ModelShape
from sparsecast.predictors.formats import BITS

FORMAT_VERSION = 3
CONFIG = "config.json"
SCORES = ("recall", "predicted_sparsity")
AGAIN = "train again, or copy the whole folder again"
ACTIVATIONS = ("relu", "fatrelu", "drelu", "relu2")


@dataclass(frozen=True, kw_only=True)
class PredictorManifest:
    """What manifest.json records."""

    model: str
    fingerprint: str
    """Fingerprint of the predictors' model, see `Checkpoint.fingerprint`."""
    convention: str
    """Where the input is taken, see core/models/families.py."""
    activation: str
    activation_threshold: float
    hidden_size: int
    ffn_width: int
    ffn_matrices: int
    dtypes: list[str]
    """Per layer: f16, q8_0 or q4_0."""
    ranks: list[int]
    calibration: list[dict[str, float]]
    """Per layer: recall and predicted_sparsity on the calibration split."""
    experts: int = optional(0)
    """Experts per layer in a mixture of experts: `dtypes`, `ranks` and `calibration` are then per
    expert, layer by layer. 0, and not in the file, in a dense model."""
    recipe: dict[str, Any]
    checksums: dict[str, str] = field(default_factory=dict)
    """Checksum of every other file, and of this one without its own; set when written."""
    format_version: int = FORMAT_VERSION

    @property
    def model_shape(self) -> ModelShape:
        return ModelShape(
            layers=len(self.ranks) // max(1, self.experts),
            hidden_size=self.hidden_size,
            ffn_width=self.ffn_width,
            ffn_matrices=self.ffn_matrices,
            experts=self.experts,
        )

    @property
    def rule(self) -> ActivationRule:
        """The activation that the predictors were trained for."""
        return ActivationRule(self.activation, self.activation_threshold)


def write_predictor_manifest(folder: Path, manifest: PredictorManifest, names: list[str]) -> None:
    """Write the manifest with the checksums of the folder's files in `names`."""
    sums = {name: file_checksum(folder / name) for name in names}
    write_manifest(folder, replace(manifest, checksums=sums))


def file_checksum(path: Path) -> str:
    """xxh3_128 of a file, read in blocks of 16 MiB."""
    digest = xxhash.xxh3_128()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    except OSError as error:
        raise unreadable_error(path, error, "a file of a predictor folder") from error
    return digest.hexdigest()


def read_manifest(folder: Path) -> PredictorManifest | None:
    """The manifest of a predictor folder; None if it has none.

    Raises:
        InputError: It has another version, is damaged, or was edited.
    """
    path = folder / MANIFEST
    if not os.path.lexists(path):  # what is there and is no file is refused
        return None
    value = read_json(path, "the manifest of a `sparsecast train` folder")
    check_version(path, value, FORMAT_VERSION, AGAIN)
    check_keys(path, value, PredictorManifest, AGAIN)
    manifest = PredictorManifest(**value)
    if (name := _invalid_field(manifest)) is not None:
        raise InputError(f"{path}: damaged, its {name} makes no sense; copy the folder again")
    if (what := find_edit(path, manifest, AGAIN)) is not None:
        raise InputError(what)
    return manifest


def check_checksum(path: Path, manifest: PredictorManifest | None) -> None:
    """Refuse a file that differs from its checksum in the manifest."""
    if manifest is None:
        return
    check_file(path, "a file of a `sparsecast train` folder")
    want = manifest.checksums.get(path.name)
    if want is None:
        raise InputError(
            f"{path}: {MANIFEST} has no checksum of it; it came from elsewhere: copy the whole "
            "folder again"
        )
    if (found := file_checksum(path)) != want:
        raise InputError(
            f"{path}: is not the file that was trained (xxh3_128 {found}, {MANIFEST} has {want}); "
            "copy the whole folder again"
        )


def number(value: Any) -> float | None:
    """A number that float32, and so PowerInfer's file, can hold; None for anything else."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    held = abs(value) <= LARGEST and (value == 0 or abs(value) >= SMALLEST)
    return float(value) if held and isfinite(value) else None


LARGEST, SMALLEST = float.fromhex("0x1.fffffep127"), float.fromhex("0x1p-149")
"""The largest and the smallest magnitude of a float32 number other than 0."""


def _invalid_field(manifest: PredictorManifest) -> str | None:
    """Name of a field that no training could have written; None if all are valid."""
    texts = ("model", "fingerprint", "convention", "activation")
    sizes = ("hidden_size", "ffn_width", "ffn_matrices")
    layers = len(manifest.dtypes) if isinstance(manifest.dtypes, list) else 0
    threshold = number(manifest.activation_threshold)
    rules: dict[str, bool] = {
        **{name: is_text(getattr(manifest, name)) for name in texts},
        **{name: is_count(getattr(manifest, name)) for name in sizes},
        "activation": manifest.activation in ACTIVATIONS,
        "activation_threshold": threshold is not None and threshold >= 0,
        "dtypes": layers > 0
        and all(isinstance(dtype, str) and dtype in BITS for dtype in manifest.dtypes),
        "ranks": _list(manifest.ranks, layers) and all(is_count(rank) for rank in manifest.ranks),
        "calibration": _list(manifest.calibration, layers)
        and all(map(_scores, manifest.calibration)),
        "experts": is_count(manifest.experts, least=0) and layers % max(1, manifest.experts) == 0,
        "recipe": isinstance(manifest.recipe, dict) and is_shallow(manifest.recipe),
        "checksums": is_checksums(manifest.checksums) and MANIFEST in manifest.checksums,
    }
    return next((name for name, sound in rules.items() if not sound), None)


def _list(value: Any, length: int) -> bool:
    return isinstance(value, list) and len(value) == length


def _scores(value: Any) -> bool:
    """Whether a value holds shares between 0 and 1, those of `SCORES` included."""
    return (
        isinstance(value, dict)
        and set(SCORES) <= set(value)
        and all(_share(score) for score in value.values())
    )


def _share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1
