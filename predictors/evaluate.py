"""`sparsecast evaluate` on a corpus: perplexity with the predictors in the loop.

Perplexity is exp of the mean NLL, over the same tokens and with the same BOS for all four modes of
modes.py. `bundle` is null for a model that PowerInfer cannot run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from sparsecast.core.disk import write_result
from sparsecast.core.dry_run import refuse_dry_run
from sparsecast.core.errors import InputError
from sparsecast.core.files import check_writable_file
from sparsecast.core.messages import log, show
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.families import activation_rule, family_of
from sparsecast.core.models.first_layers import check_model_memory, keeps_own_copy
from sparsecast.core.models.loading import embedding_rows, load_model, pick_device, pick_dtype
from sparsecast.core.models.perplexity import dense_perplexity, perplexity
from sparsecast.core.models.pretrained import empty_model
from sparsecast.core.models.shape import model_shape, weight_bytes
from sparsecast.core.progress import progress_bar
from sparsecast.core.run_record import Run, begin_run
from sparsecast.core.text.corpus import Document, read_documents, start_reading
from sparsecast.core.text.skipped import SkippedRows
from sparsecast.core.text.splits import assign_splits
from sparsecast.core.text.tokens import TokenBatch, token_batches
from sparsecast.predictors.checkpoint import PredictorSet, load_predictors
from sparsecast.predictors.compatibility import check_model, check_usage
from sparsecast.predictors.config import EvaluateConfig
from sparsecast.predictors.modes import MODES, NO_BUNDLE, Mode, has_bundle, in_each_mode


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """One evaluation, its model loaded and its documents tokenized."""

    model: PreTrainedModel
    tokenizer: Tokenizer
    predictors: PredictorSet
    batches: list[TokenBatch]
    """Held-out documents of the corpus; empty without one."""
    skipped: SkippedRows
    """The rows of the corpus that could not be used."""
    run: Run
    """What the JSON says of the run."""


def evaluate(cfg: EvaluateConfig) -> dict[str, Any]:
    """Measure the four perplexities and their change against dense; write them to `cfg.json`.

    Memory beyond the model: one batch's logits and one layer's mask.

    Returns:
        What --json writes.

    Raises:
        InputError: See `resolve`; a model that overflows; --tasks, which this function cannot run.
    """
    refuse_dry_run(cfg.dry_run, "predictors.evaluate_dry_run.forecast")
    if cfg.tasks is not None:
        raise InputError(
            "--tasks: lm-eval's tasks are run by sparsecast.integrations.lm_eval.run.evaluate; "
            "call that with the same config"
        )
    if cfg.json is not None:
        check_writable_file(cfg.json, "--json")
    plan = resolve(cfg)
    result = summarize(cfg, plan, perplexities(plan.model, plan.predictors, plan.batches))
    result["run"] = asdict(plan.run.record())
    show_perplexities(result)
    plan.skipped.tell()
    if cfg.json is not None:
        write_result(cfg.json, result)
    return result


def resolve(cfg: EvaluateConfig) -> EvaluationPlan:
    """Open the inputs, and refuse predictors of another model, input or activation.

    Raises:
        InputError: See `open_model_with_predictors` and `read_documents`; no held-out text in the
            corpus.
    """
    predictors = load_predictors(cfg.predictors)
    skipped = SkippedRows(cfg.corpus or "no corpus")
    started = start_corpus(cfg, skipped)
    check_fits(outline_of(cfg))
    model, tokenizer = open_model_with_predictors(
        cfg.model,
        predictors,
        str(cfg.predictors),
        device=cfg.device,
        dtype=cfg.dtype,
        activation_threshold=cfg.activation_threshold,
    )
    dtype = str(model.dtype).removeprefix("torch.")
    run = begin_run("evaluate", cfg, device=pick_device(cfg.device), dtype=dtype)
    return EvaluationPlan(
        model=model,
        tokenizer=tokenizer,
        predictors=predictors,
        batches=held_out_batches(cfg, started, tokenizer, embedding_rows(model), skipped),
        skipped=skipped,
        run=run,
    )


def start_corpus(
    cfg: EvaluateConfig, skipped: SkippedRows
) -> Iterator[tuple[str, Document]] | None:
    """Begin to read the corpus, so that it is refused before a model is loaded; None without."""
    if cfg.corpus is None:
        return None
    documents = read_documents(
        cfg.corpus, seq_len=cfg.seq_len, long_documents=cfg.long_documents, skipped=skipped
    )
    return start_reading(cfg.corpus, assign_splits(documents))


def held_out_batches(
    cfg: EvaluateConfig,
    started: Iterator[tuple[str, Document]] | None,
    tokenizer: Tokenizer,
    vocabulary: int,
    skipped: SkippedRows,
) -> list[TokenBatch]:
    """Tokenize the held-out documents; empty without a corpus.

    Args:
        vocabulary: Rows of the model's embedding.
    """
    if started is None:
        return []
    held_out = token_batches(
        started,
        tokenizer,
        {"held-out": cfg.tokens},
        seq_len=cfg.seq_len,
        batch_size=cfg.batch_size,
        vocabulary=vocabulary,
        long_documents=cfg.long_documents,
        skipped=skipped,
    )
    if not (batches := list(held_out)):
        raise InputError(f"{cfg.corpus}: has no held-out document; give more text, in more files")
    return batches


@dataclass(frozen=True, kw_only=True)
class Outline:
    """An evaluation's model before its weights are loaded."""

    checkpoint: Checkpoint
    model: PreTrainedModel
    """On the meta device."""
    device: torch.device
    dtype: torch.dtype
    weights: int
    """Bytes in `dtype`."""
    own: bool
    """Whether they take memory of their own on a CPU: `bundle` rounds mapped ones in place."""


def outline_of(cfg: EvaluateConfig) -> Outline:
    """Resolve what needs no weights."""
    checkpoint = Checkpoint(cfg.model)
    config = checkpoint.config
    activation_rule(config, cfg.model, cfg.activation_threshold)
    device = pick_device(cfg.device)
    dtype = pick_dtype(cfg.dtype, config.dtype, device)
    model = empty_model(config)
    return Outline(
        checkpoint=checkpoint,
        model=model,
        device=device,
        dtype=dtype,
        weights=weight_bytes(model, dtype),
        own=keeps_own_copy(checkpoint, dtype) or has_bundle(model),
    )


def check_fits(outline: Outline) -> None:
    """Raise `InputError` if the memory cannot hold the model alone."""
    check_model_memory("evaluate", outline.device, outline.dtype, outline.weights, own=outline.own)


def open_model_with_predictors(
    source: str,
    predictors: PredictorSet,
    folder: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    activation_threshold: float | None = None,
) -> tuple[PreTrainedModel, Tokenizer]:
    """Load a model and its tokenizer; refuse predictors that are not its own.

    Args:
        folder: Where the predictors are from, for messages.

    Raises:
        InputError: See `load_model`, `check_model` and `check_usage`.
    """
    model, tokenizer = load_model(
        source, device=device, dtype=dtype, activation_threshold=activation_threshold
    )
    fingerprint = Checkpoint(source).fingerprint
    check_model(predictors, folder, model_shape(model), fingerprint=fingerprint, model=source)
    rule = activation_rule(model.config, source)
    check_usage(predictors, folder, rule, family_of(model.config, source).convention, source)
    return model, tokenizer


def perplexities(
    model: PreTrainedModel, predictors: PredictorSet, data: list[TokenBatch]
) -> dict[Mode, float | None]:
    """Measure all four perplexities, None for `bundle` if PowerInfer cannot run the model.

    Leaves the model rounded to f16 with plain ReLU if it can.
    """
    modes = len(MODES) - (not has_bundle(model))
    with progress_bar("evaluate", modes * len(data)) as progress:
        return in_each_mode(
            model,
            predictors,
            lambda mode: perplexity_in(mode, model, data, lambda _: progress.advance()),
        )


def perplexity_in(
    mode: Mode,
    model: PreTrainedModel,
    data: list[TokenBatch],
    on_batch: Callable[[TokenBatch], object],
) -> float:
    """Return the perplexity of a model that runs in `mode`; that of `dense` must be finite."""
    measure = dense_perplexity if mode == "dense" else perplexity
    return measure(model, data, on_batch)


def summarize(
    cfg: EvaluateConfig, plan: EvaluationPlan, values: Mapping[Mode, float | None]
) -> dict[str, Any]:
    """Return what --json says of the perplexities."""
    dense = values["dense"]
    assert dense is not None
    return {
        "model": cfg.model,
        "corpus": cfg.corpus,
        "tokens": sum(batch.tokens for batch in plan.batches),
        "seq_len": cfg.seq_len,
        "long_documents": cfg.long_documents,
        "skipped": plan.skipped.count,
        "perplexity": dict(values),
        "change": {
            name: None if value is None else value / dense - 1
            for name, value in values.items()
            if name != "dense"
        },
    }


def show_perplexities(result: dict[str, Any]) -> None:
    """Show the table of perplexities, and what each mode is."""
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
