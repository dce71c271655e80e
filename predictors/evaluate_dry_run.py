"""What an evaluation will take, before it starts: a batch in every mode on the first layers.

The weights are the model's own, since the time of `exact` depends on how many neurons fire. What
the second layer adds to the time is multiplied by the number of layers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from sparsecast.core.distributed import distributed_context
from sparsecast.core.dry_run import (
    PYTHON,
    UNMEASURED,
    Forecast,
    base_memory,
    check_forecast,
    extrapolate,
    show_forecast,
    timed,
)
from sparsecast.core.errors import InputError
from sparsecast.core.files import check_writable_file
from sparsecast.core.models.families import activation_rule, family_of
from sparsecast.core.models.first_layers import (
    Measured,
    load_first_layers,
    measure,
    model_memory,
)
from sparsecast.core.models.loading import check_checkpoint
from sparsecast.core.models.perplexity import perplexity
from sparsecast.core.models.shape import model_shape
from sparsecast.core.text.skipped import SkippedRows
from sparsecast.core.text.tokens import TokenBatch
from sparsecast.predictors.checkpoint import PredictorSet, load_predictors
from sparsecast.predictors.compatibility import check_model, check_usage
from sparsecast.predictors.config import EvaluateConfig
from sparsecast.predictors.evaluate import (
    Outline,
    check_fits,
    held_out_batches,
    outline_of,
    start_corpus,
)
from sparsecast.predictors.modes import Mode, in_each_mode

HOW = "from a batch in each mode on one and on two layers"
WITHOUT_TASKS = "; without --tasks, which their own requests decide"


def forecast(cfg: EvaluateConfig) -> Forecast | None:
    """Show what `evaluate` with these options will take, and return it; None on other ranks.

    Nothing is written.

    Raises:
        InputError: What `evaluate` refuses before it loads the model; or a run that the memory
            cannot hold, after the table.
    """
    with distributed_context() as context:
        return _forecast(cfg) if context.leads else None


def _forecast(cfg: EvaluateConfig) -> Forecast:
    if cfg.json is not None:
        check_writable_file(cfg.json, "--json")
    predictors = load_predictors(cfg.predictors)
    skipped = SkippedRows(cfg.corpus or "no corpus")
    started = start_corpus(cfg, skipped)
    outline = outline_of(cfg)
    tokenizer = check_checkpoint(outline.checkpoint)
    _check_predictors(cfg, outline, predictors)
    vocabulary = outline.model.config.vocab_size
    batches = held_out_batches(cfg, started, tokenizer, vocabulary, skipped)
    if not batches:
        ids_BS = torch.randint(vocabulary, (cfg.batch_size, cfg.seq_len))
        batches = [TokenBatch("held-out", ids_BS, torch.ones_like(ids_BS, dtype=torch.bool))]
    base = base_memory(outline.device)
    measured: list[Measured] = []
    misfit: InputError | None = None
    try:
        check_fits(outline)
    except InputError as error:
        misfit = error
    else:
        largest = max(batches, key=lambda batch: batch.ids_BS.numel())
        measured = [_measure(cfg, outline, predictors, largest, count) for count in (1, 2)]
    found = _put_together(cfg, outline, predictors, batches, base, measured)
    show_forecast(found)
    if misfit is not None:
        raise misfit
    check_forecast(found, "choose a smaller --batch-size or --dtype")
    return found


def _check_predictors(cfg: EvaluateConfig, outline: Outline, predictors: PredictorSet) -> None:
    folder, source, config = str(cfg.predictors), cfg.model, outline.checkpoint.config
    shape, fingerprint = model_shape(outline.model), outline.checkpoint.fingerprint
    check_model(predictors, folder, shape, fingerprint=fingerprint, model=source)
    rule = activation_rule(config, source, cfg.activation_threshold)
    check_usage(predictors, folder, rule, family_of(config, source).convention, source)


def _measure(
    cfg: EvaluateConfig, outline: Outline, predictors: PredictorSet, batch: TokenBatch, layers: int
) -> Measured:
    """Measure every mode on the first layers; seconds are those of a place in the batch."""
    rule = activation_rule(outline.checkpoint.config, cfg.model, cfg.activation_threshold)
    first = replace(predictors, layers=predictors.layers[: layers * max(1, predictors.experts)])

    def use(model: PreTrainedModel) -> float:
        def seconds(_: Mode) -> float:
            return timed(lambda: perplexity(model, [batch]), outline.device)

        modes = in_each_mode(model, first, seconds)
        return sum(value for value in modes.values() if value is not None) / batch.ids_BS.numel()

    def load() -> Any:
        return load_first_layers(
            outline.checkpoint, layers, dtype=outline.dtype, device=outline.device, rule=rule
        )

    return measure(load, use, outline.device)


def _put_together(
    cfg: EvaluateConfig,
    outline: Outline,
    predictors: PredictorSet,
    batches: list[TokenBatch],
    base: int,
    measured: list[Measured],
) -> Forecast:
    seconds = {}
    one = measured[0] if measured else None
    if one is not None:
        two, layers = measured[1], predictors.layer_count
        seconds["loading"] = two.load_seconds * outline.weights / two.weights
        places = sum(batch.ids_BS.numel() for batch in batches)
        if cfg.corpus is not None:
            whole = extrapolate(layers, {1: one.seconds, 2: two.seconds})
            seconds["perplexities"] = places * whole
        if outline.own and not one.own_weights:  # rounding in place has made copies of them
            one = replace(one, host=max(0, one.host - one.weights))
    host, pages, on_device = model_memory(
        outline.checkpoint,
        outline.device,
        outline.dtype,
        outline.weights,
        one,
        {},
        rounded=outline.own,
    )
    if on_device:
        each = [sum(weight.nbytes for weight in layer.weights) for layer in predictors.layers]
        on_device["predictors"] = sum(each)
    without = WITHOUT_TASKS if cfg.tasks is not None else ""
    return Forecast(
        what="evaluate",
        out=None,
        device=outline.device,
        host={PYTHON: base, **host},
        pages=pages,
        on_device=on_device,
        seconds=seconds,
        note=HOW + without if seconds else UNMEASURED,
    )
