"""Whether a bundle says whose its predictors are."""

from __future__ import annotations

from typing import Any

from sparsecast.core.errors import InputError
from sparsecast.core.files import read_json
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.families import activation_rule
from sparsecast.export.checks.base import Check
from sparsecast.export.read.reader import GGUFFile
from sparsecast.predictors.compatibility import mismatches
from sparsecast.predictors.manifest import PredictorManifest


def made_for(file: GGUFFile) -> dict[str, Any]:
    """What the bundle's predictors say about themselves; empty where they say nothing, or nothing
    that can be read."""
    try:
        path = file.path.parent / "predictor" / "manifest.json"
        return read_json(path, "the manifest of the bundle's predictors")
    except InputError:
        return {}


def foreign(
    file: GGUFFile,
    manifest: PredictorManifest | None,
    checkpoint: Checkpoint | None,
    threshold: float | None,
) -> list[str] | None:
    """Where the predictors are of another model, input or activation than the file's, as --force
    allows; None where one of them does not say.

    Args:
        checkpoint: The file's model, where it is at hand; else fingerprints alone are compared.
        threshold: FATReLU's T, where the model's config has lost it.
    """
    model = file.keys.get("sparsecast.model_fingerprint")
    if manifest is None or model is None:
        return None
    return _odd(manifest, model, checkpoint, threshold)


def check_predictor_model(manifest: PredictorManifest | None, odd: list[str] | None) -> list[Check]:
    """Told, and left to the reader; nothing where they do not say.

    Args:
        odd: See `foreign`.
    """
    if manifest is None or odd is None:
        return []
    detail = f"trained for {manifest.model} (fingerprint {manifest.fingerprint})"
    if odd:
        detail = f"NOT for this model, exported with --force: {'; '.join(odd)}"
    return [Check("predictor model", True, detail)]


def _odd(
    manifest: PredictorManifest,
    model: str,
    checkpoint: Checkpoint | None,
    threshold: float | None,
) -> list[str]:
    if checkpoint is not None and checkpoint.fingerprint == model:
        rule = activation_rule(checkpoint.config, checkpoint.source, threshold)
        return mismatches(manifest, checkpoint, rule)
    if manifest.fingerprint == model:
        return []
    return [
        f"trained for {manifest.model} (fingerprint {manifest.fingerprint}), but the file holds "
        f"fingerprint {model}"
    ]
