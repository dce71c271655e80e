"""What an export takes, resolved from its options."""

from __future__ import annotations

from pathlib import Path

from sparsecast.core.errors import InputError
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.export.write.hparams import HParams
from sparsecast.predictors.checkpoint import PredictorSet, load_predictors
from sparsecast.predictors.compatibility import check_sizes, mismatches


def predictors_for(
    folder: Path, checkpoint: Checkpoint, hparams: HParams, *, force: bool
) -> tuple[PredictorSet, list[str]]:
    """Load the predictors, and list how they differ from this model's where `force` allows it.

    Raises:
        InputError: See `load_predictors` and `check_sizes`; predictors of another model, another
            input or another activation, unless forced.
    """
    predictors = load_predictors(folder)
    check_sizes(predictors, str(folder), hparams.model_shape, model=checkpoint.source)
    manifest = predictors.manifest
    wrong = [] if manifest is None else mismatches(manifest, checkpoint, hparams.activation)
    if wrong and not force:
        raise InputError(
            f"{folder}: {'; '.join(wrong)}; give predictors of this model, or accept these with "
            "--force"
        )
    return predictors, wrong
