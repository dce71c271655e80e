"""Whether predictors belong to a model: its sizes, its weights, its input and its activation.

Sizes are always compared. What else a manifest says, `sparsecast export --force` can set aside;
predictors without a manifest, as PowerInfer publishes them, have only sizes to compare.
"""

from __future__ import annotations

from sparsecast.core.errors import InputError
from sparsecast.core.models.activations import ActivationRule
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.families import family_of
from sparsecast.core.models.shape import ModelShape
from sparsecast.predictors.checkpoint import PredictorSet, model_file
from sparsecast.predictors.manifest import PredictorManifest


def check_sizes(predictors: PredictorSet, where: str, shape: ModelShape, *, model: str) -> None:
    """Refuse predictors of other layers or sizes than `model` has."""
    if predictors.experts != shape.experts:
        raise InputError(
            f"{where}: has predictors for {_experts(predictors.experts)}, but {model} has "
            f"{_experts(shape.experts)}; give the predictors of this model"
        )
    if predictors.layer_count != shape.layers:
        raise InputError(
            f"{where}: has predictors for {predictors.layer_count} layers, but {model} has "
            f"{shape.layers}; give the predictors of this model"
        )
    for i, predictor in enumerate(predictors.layers):
        fc1, fc2 = tuple(predictor.fc1_RD.shape), tuple(predictor.fc2_FR.shape)
        if fc1[1] != shape.hidden_size or fc2[0] != shape.ffn_width:
            raise InputError(
                f"{where}: {model_file(i, shape.experts)} has fc1 {fc1} and fc2 {fc2}, but "
                f"{model} needs (R, {shape.hidden_size}) and ({shape.ffn_width}, R); give the "
                "predictors of this model"
            )


def _experts(count: int) -> str:
    return f"{count} experts per layer" if count else "a dense FFN per layer"


def check_model(
    predictors: PredictorSet, where: str, shape: ModelShape, *, fingerprint: str, model: str
) -> None:
    """Refuse predictors that were trained for another model than `model`."""
    check_sizes(predictors, where, shape, model=model)
    manifest = predictors.manifest
    if manifest is not None and manifest.fingerprint != fingerprint:
        raise InputError(
            f"{where}: was trained for {manifest.model} (fingerprint {manifest.fingerprint}), but "
            f"{model} has fingerprint {fingerprint}; train predictors for this model"
        )


def check_usage(
    predictors: PredictorSet, where: str, rule: ActivationRule, convention: str, model: str
) -> None:
    """Refuse predictors that were trained for another input or activation."""
    manifest = predictors.manifest
    if manifest is not None and (wrong := usage_mismatches(manifest, rule, convention, model)):
        raise InputError(f"{where}: {'; '.join(wrong)}; give predictors of this model")


def mismatches(
    manifest: PredictorManifest, checkpoint: Checkpoint, rule: ActivationRule
) -> list[str]:
    """List how the predictors' model, input and activation differ from the checkpoint's."""
    found, model = [], checkpoint.source
    if manifest.fingerprint != checkpoint.fingerprint:
        found.append(
            f"trained for {manifest.model} (fingerprint {manifest.fingerprint}), but {model} has "
            f"fingerprint {checkpoint.fingerprint}"
        )
    convention = family_of(checkpoint.config, model).convention
    return found + usage_mismatches(manifest, rule, convention, model)


def usage_mismatches(
    manifest: PredictorManifest, rule: ActivationRule, convention: str, model: str
) -> list[str]:
    """List how the predictors' input and activation differ from the model's."""
    found = []
    if manifest.convention != convention:
        found.append(
            f"trained on the input {manifest.convention!r}, but PowerInfer gives predictors of "
            f"{model} the input {convention!r}"
        )
    theirs = manifest.rule
    if (theirs.on_up, theirs.threshold) != (rule.on_up, rule.threshold):
        lost = f" (--activation-threshold {theirs.threshold:g}?)" if theirs.threshold else ""
        found.append(f"trained for {theirs} in the FFN, but {model} has {rule}{lost}")
    return found
