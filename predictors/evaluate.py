"""`sparsecast evaluate`: perplexity with the predictors in the loop.

    dense       the model as it is
    exact       up only where the gate fires, down only over active neurons; no predictor
    predicted   the predictors' masks and the model's own activation
    bundle      the predictors' masks, plain ReLU and weights rounded to f16, as PowerInfer computes

Perplexity is exp of the mean NLL, over the same tokens and with the same BOS for all four.
`predicted` and `bundle` differ for FATReLU models, because PowerInfer knows no threshold. A model
that PowerInfer cannot run, with ReLU² or with a mixture of experts, has no `bundle`: it is null.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from transformers import PreTrainedModel

from sparsecast.core.errors import InputError
from sparsecast.core.files import check_writable_file, write_json
from sparsecast.core.messages import log, show
from sparsecast.core.models.activations import ActivationRule
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.families import activation_rule, family_of
from sparsecast.core.models.loading import embedding_rows, load_model, set_activation
from sparsecast.core.models.perplexity import dense_perplexity, perplexity
from sparsecast.core.models.scales import folded, scales_of, untie
from sparsecast.core.models.shape import model_shape
from sparsecast.core.progress import progress_bar
from sparsecast.core.text.corpus import read_documents, start_reading
from sparsecast.core.text.skipped import SkippedRows
from sparsecast.core.text.splits import assign_splits
from sparsecast.core.text.tokens import TokenBatch, token_batches
from sparsecast.predictors.checkpoint import PredictorSet, load_predictors
from sparsecast.predictors.compatibility import check_model, check_usage
from sparsecast.predictors.config import EvaluateConfig
from sparsecast.predictors.model_in_loop import exact_in_loop, predictors_in_loop

MODES = {
    "dense": "the model as it is",
    "exact": "only neurons whose gate fires are computed, without predictors",
    "predicted": "only predicted neurons are computed, with the model's own activation",
    "bundle": "only predicted neurons are computed, with plain ReLU and f16 weights, as PowerInfer "
    "does",
}
NO_BUNDLE = "not measured: PowerInfer runs neither ReLU² nor mixtures of experts"


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """One evaluation, its model loaded and its documents tokenized."""

    model: PreTrainedModel
    predictors: PredictorSet
    batches: list[TokenBatch]
    """Held-out documents of the corpus."""
    skipped: SkippedRows
    """The rows of the corpus that could not be used."""


def evaluate(cfg: EvaluateConfig) -> dict[str, Any]:
    """Measure the four perplexities and their change against dense; write them to `cfg.json`.

    Memory beyond the model: one batch's logits and one layer's mask.

    Returns:
        What --json writes.

    Raises:
        InputError: See `load_model`, `load_predictors`, `check_model`, `check_usage` and
            `read_documents`; no held-out text in the corpus; a model that overflows.
    """
    if cfg.json is not None:
        check_writable_file(cfg.json, "--json")
    plan = _resolve(cfg)
    values = perplexities(plan.model, plan.predictors, plan.batches)
    dense = values["dense"]
    assert dense is not None
    result = {
        "model": cfg.model,
        "corpus": cfg.corpus,
        "tokens": sum(batch.tokens for batch in plan.batches),
        "seq_len": cfg.seq_len,
        "long_documents": cfg.long_documents,
        "skipped": plan.skipped.count,
        "perplexity": values,
        "change": {
            name: None if value is None else value / dense - 1
            for name, value in values.items()
            if name != "dense"
        },
    }
    _show(result)
    plan.skipped.tell()
    if cfg.json is not None:
        write_json(cfg.json, result)
    return result


def _resolve(cfg: EvaluateConfig) -> EvaluationPlan:
    """Open the inputs, and refuse predictors of another model, input or activation."""
    predictors = load_predictors(cfg.predictors)
    skipped = SkippedRows(cfg.corpus)
    documents = read_documents(
        cfg.corpus, seq_len=cfg.seq_len, long_documents=cfg.long_documents, skipped=skipped
    )
    # refuses a corpus before the model is loaded
    started = start_reading(cfg.corpus, assign_splits(documents))
    model, tokenizer = load_model(
        cfg.model,
        device=cfg.device,
        dtype=cfg.dtype,
        activation_threshold=cfg.activation_threshold,
    )
    folder = str(cfg.predictors)
    fingerprint = Checkpoint(cfg.model).fingerprint
    check_model(predictors, folder, model_shape(model), fingerprint=fingerprint, model=cfg.model)
    rule = activation_rule(model.config, cfg.model)
    convention = family_of(model.config, cfg.model).convention
    check_usage(predictors, folder, rule, convention, cfg.model)
    held_out = token_batches(
        started,
        tokenizer,
        {"held-out": cfg.tokens},
        seq_len=cfg.seq_len,
        batch_size=cfg.batch_size,
        vocabulary=embedding_rows(model),
        long_documents=cfg.long_documents,
        skipped=skipped,
    )
    if not (batches := list(held_out)):
        raise InputError(f"{cfg.corpus}: has no held-out document; give more text, in more files")
    return EvaluationPlan(model=model, predictors=predictors, batches=batches, skipped=skipped)


def perplexities(
    model: PreTrainedModel, predictors: PredictorSet, data: list[TokenBatch]
) -> dict[str, float | None]:
    """Measure all four perplexities, None for `bundle` if PowerInfer cannot run the model.

    Leaves the model rounded to f16 with plain ReLU if it can.
    """
    values: dict[str, float | None] = {}
    rule = activation_rule(model.config, "model")
    runs = not (rule.squared or predictors.experts)
    warnings.filterwarnings("ignore", message="Sparse (CSR|invariant)")
    with progress_bar("evaluate", (len(MODES) - (not runs)) * len(data)) as progress:
        values["dense"] = dense_perplexity(model, data, lambda _: progress.advance())
        with exact_in_loop(model):
            values["exact"] = perplexity(model, data, lambda _: progress.advance())
        with predictors_in_loop(model, predictors):
            values["predicted"] = perplexity(model, data, lambda _: progress.advance())
        if not runs:
            return values | {"bundle": None}
        _round_as_bundle(model)
        if not rule.on_up:
            set_activation(model, ActivationRule("relu"))
        with predictors_in_loop(model, predictors):
            values["bundle"] = perplexity(model, data, lambda _: progress.advance())
    return values


@torch.no_grad()
def _round_as_bundle(model: PreTrainedModel) -> None:
    """Round every matrix to f16 in place, as a bundle stores it; vectors are f32 there.

    A bundle has no scales: it stores a Granite's or MiniCPM's weights with their factors.
    """
    if (scales := scales_of(model.config)) is not None:
        untie(model)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            factor = 1.0 if scales is None else scales.factor(name)
            parameter.copy_(folded(parameter, factor).half().float() / factor)


def _show(result: dict[str, Any]) -> None:
    title = f"perplexity on {result['tokens']:,} held-out tokens of {result['corpus']}"
    log.info(title, extra={"style": "italic"})
    table = Table()
    table.add_column("FFN")
    table.add_column("perplexity", justify="right")
    table.add_column("change", justify="right")
    for name, value in result["perplexity"].items():
        change = result["change"].get(name)
        shown = "-" if value is None else f"{value:.4f}"
        table.add_row(name, shown, "" if change is None else f"{change:+.2%}")
    show(table)
    for name, text in MODES.items():
        log.info(f"{name}: {NO_BUNDLE if result['perplexity'][name] is None else text}")
