"""The model class `sparsecast` of lm-eval: one mode of a model with its predictors."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lm_eval.api.registry import register_model

from sparsecast.core.errors import InputError
from sparsecast.core.models.loading import load_model
from sparsecast.integrations.lm_eval.model import OneBosLM
from sparsecast.predictors.checkpoint import PredictorSet, load_predictors
from sparsecast.predictors.evaluate import open_model_with_predictors
from sparsecast.predictors.modes import MODES, NO_BUNDLE, Mode, has_bundle, in_mode


@register_model("sparsecast")
class SparsecastLM(OneBosLM):
    """`--model sparsecast --model_args pretrained=M,predictors=PRED,mode=predicted`."""

    def __init__(
        self,
        pretrained: str | None = None,
        predictors: str | None = None,
        mode: Mode = "predicted",
        *,
        device: str | None = None,
        dtype: str = "auto",
        activation_threshold: float | None = None,
        batch_size: int | str = 1,
        max_batch_size: int = 64,
        max_length: int | None = None,
        **others: Any,
    ) -> None:
        """Load the model and run it in one mode from now on.

        Args:
            pretrained: Folder or Hugging Face id.
            predictors: Folder of predictors; needed by predicted and bundle.
            mode: dense, exact, predicted or bundle.
            device: cpu, cuda or cuda:N; unset: CUDA if there is one.
            others: None; lm-eval's own arguments that have no meaning here are refused.

        Raises:
            InputError: See `open_model_with_predictors`; no model; an unknown mode or argument; no
                predictors where the mode needs some; bundle of a model that PowerInfer cannot run.
        """
        if pretrained is None:
            raise InputError("--model_args: names no model; add pretrained=FOLDER or a hub id")
        _check_arguments(predictors, mode, others)
        options: dict[str, Any] = {"device": device or "auto", "dtype": dtype}
        options["activation_threshold"] = activation_threshold
        found: PredictorSet | None = None
        if predictors is None:
            model, tokenizer = load_model(str(pretrained), **options)
        else:
            found = load_predictors(Path(str(predictors)))
            model, tokenizer = open_model_with_predictors(
                str(pretrained), found, str(predictors), **options
            )
        if mode == "bundle" and not has_bundle(model):
            raise InputError(f"--model_args mode=bundle: {NO_BUNDLE}; choose another mode")
        super().__init__(
            model,
            tokenizer,
            batch_size=batch_size,
            max_batch_size=max_batch_size,
            max_length=max_length,
        )
        self._mode = ExitStack()
        self._mode.enter_context(in_mode(model, found, mode))


def _check_arguments(predictors: str | None, mode: str, others: dict[str, Any]) -> None:
    if others:
        known = "pretrained, predictors, mode, dtype, activation_threshold, max_length"
        raise InputError(
            f"--model_args {next(iter(others))}: not an argument of --model sparsecast; "
            f"expected {known}"
        )
    if mode not in MODES:
        raise InputError(f"--model_args mode: got {mode!r}, expected {', '.join(MODES)}")
    if predictors is None and mode in ("predicted", "bundle"):
        raise InputError(
            f"--model_args mode={mode}: needs predictors; add predictors=FOLDER, or choose "
            "mode=dense or mode=exact"
        )
