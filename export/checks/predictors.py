"""Check the predictor folder beside the file, and whether its predictors belong to the model."""

from __future__ import annotations

from typing import Any

import torch

from sparsecast.core.errors import InputError
from sparsecast.core.files import read_json
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.families import activation_rule
from sparsecast.export.checks.base import Check, same
from sparsecast.export.read.header import header_of
from sparsecast.export.read.reader import GGUFFile
from sparsecast.export.traffic import traffic_of
from sparsecast.predictors.checkpoint import PredictorSet, load_predictors
from sparsecast.predictors.compatibility import mismatches
from sparsecast.predictors.manifest import PredictorManifest


def predictor_manifest(file: GGUFFile) -> dict[str, Any]:
    """Read the manifest of the bundle's predictors; empty where there is none or it is damaged."""
    try:
        path = file.path.parent / "predictor" / "manifest.json"
        return read_json(path, "the manifest of the bundle's predictors")
    except InputError:
        return {}


def check_predictors(
    file: GGUFFile, checkpoint: Checkpoint | None, threshold: float | None
) -> tuple[list[Check], PredictorManifest | None]:
    """Check the predictor folder; return its manifest if it is of the file's model.

    Args:
        checkpoint: The file's model, where it is at hand; else only fingerprints are compared.
        threshold: FATReLU's threshold, where the model's config has lost it.
    """
    try:
        predictors = load_predictors(file.path.parent / "predictor")
    except InputError as error:
        return [Check("predictor folder", False, str(error))], None
    manifest = predictors.manifest
    wrong = _mismatches(file, manifest, checkpoint, threshold)
    checks = [check_predictor_folder(file, predictors), *_check_model(manifest, wrong)]
    checks += _check_traffic(file, manifest)
    fits = not wrong and len(predictors.layers) == header_of(file).layers
    return checks, manifest if fits else None


def _mismatches(
    file: GGUFFile,
    manifest: PredictorManifest | None,
    checkpoint: Checkpoint | None,
    threshold: float | None,
) -> list[str] | None:
    """List how the predictors' model, input or activation differ from the file's.

    `export --force` allows that. None where the manifest or the file does not name its model.
    """
    model = file.keys.get("sparsecast.model_fingerprint")
    if manifest is None or model is None:
        return None
    if checkpoint is not None and checkpoint.fingerprint == model:
        rule = activation_rule(checkpoint.config, checkpoint.source, threshold)
        return mismatches(manifest, checkpoint, rule)
    if manifest.fingerprint == model:
        return []
    return [
        f"trained for {manifest.model} (fingerprint {manifest.fingerprint}), but the file holds "
        f"fingerprint {model}"
    ]


def _check_model(manifest: PredictorManifest | None, wrong: list[str] | None) -> list[Check]:
    """Name the model that the predictors were trained for; a mismatch is reported, not failed."""
    if manifest is None or wrong is None:
        return []
    detail = f"trained for {manifest.model} (fingerprint {manifest.fingerprint})"
    if wrong:
        detail = f"NOT for this model, exported with --force: {'; '.join(wrong)}"
    return [Check("predictor model", True, detail)]


def check_predictor_folder(file: GGUFFile, predictors: PredictorSet) -> Check:
    """Compare fc1, fc2 and the threshold in predictor/ with the file's."""
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


def _check_traffic(file: GGUFFile, manifest: PredictorManifest | None) -> list[Check]:
    """Report the traffic by the predictors' own scores; nothing without scores."""
    if manifest is None or len(manifest.calibration) != header_of(file).layers:
        return []
    stored = {name: (entry.type.name, entry.shape) for name, entry in file.entries.items()}
    return [Check("traffic", True, str(traffic_of(stored, manifest.calibration)))]
