"""Whether predictors were trained for the model that they are exported with.

Shapes must fit whatever is said. What else a manifest says of the model can be set aside with
--force; predictors without a manifest, as PowerInfer publishes them, say nothing.
"""

from __future__ import annotations

from pathlib import Path

from sparsecast.core.errors import InputError
from sparsecast.core.models.activations import ActivationRule
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.families import family_of
from sparsecast.export.write.hparams import HParams
from sparsecast.predictors.checkpoint import (
    PredictorSet,
    check_fits,
    load_predictors,
    used_otherwise,
)
from sparsecast.predictors.manifest import PredictorManifest


def predictors_for(
    folder: Path, checkpoint: Checkpoint, hyper: HParams, *, force: bool
) -> tuple[PredictorSet, list[str]]:
    """The predictors, and where they are not this model's, in words; nothing where they are.

    Raises:
        InputError: See `load_predictors` and `check_fits`; predictors of another model, of another
            input or for another activation, unless forced.
    """
    predictors = load_predictors(folder)
    check_fits(
        predictors,
        str(folder),
        hyper.model_shape,
        model=checkpoint.source,
    )
    manifest = predictors.manifest
    odd = [] if manifest is None else differences(manifest, checkpoint, hyper.activation)
    if odd and not force:
        raise InputError(
            f"{folder}: {'; '.join(odd)}; give predictors of this model, or accept these with "
            "--force"
        )
    return predictors, odd


def differences(
    manifest: PredictorManifest, checkpoint: Checkpoint, rule: ActivationRule
) -> list[str]:
    """What the manifest says that is not so of this model."""
    found, model = [], checkpoint.source
    if manifest.fingerprint != checkpoint.fingerprint:
        found.append(
            f"trained for {manifest.model} (fingerprint {manifest.fingerprint}), but {model} has "
            f"fingerprint {checkpoint.fingerprint}"
        )
    convention = family_of(checkpoint.config, model).convention
    return found + used_otherwise(manifest, rule, convention, model)
