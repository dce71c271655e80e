"""`sparsecast evaluate` on a corpus: perplexity with the predictors in the loop.

Perplexity is exp of the mean NLL, over the same tokens and with the same BOS for all four modes of
modes.py. `bundle` is null for a model that PowerInfer cannot run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from sparsecast.core.errors import InputError
from sparsecast.core.files import check_writable_file, write_json
from sparsecast.core.messages import log, show
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.families import activation_rule, family_of
from sparsecast.core.models.loading import embedding_rows, load_model, pick_device
from sparsecast.core.models.perplexity import dense_perplexity, perplexity
from sparsecast.core.models.shape import model_shape
from sparsecast.core.progress import progress_bar
from sparsecast.core.run_record import Run, begin_run
from sparsecast.core.text.corpus import read_documents, start_reading
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
        write_json(cfg.json, result)
    return result


def resolve(cfg: EvaluateConfig) -> EvaluationPlan:
    """Open the inputs, and refuse predictors of another model, input or activation.

    Raises:
        InputError: See `open_model_with_predictors` and `read_documents`; no held-out text in the
            corpus.
    """
    predictors = load_predictors(cfg.predictors)
    corpus = cfg.corpus
    skipped = SkippedRows(corpus or "no corpus")
    started = None
    if corpus is not None:  # refused before the model is loaded
        documents = read_documents(
            corpus, seq_len=cfg.seq_len, long_documents=cfg.long_documents, skipped=skipped
        )
        started = start_reading(corpus, assign_splits(documents))
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
    batches: list[TokenBatch] = []
    if started is not None:
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
            raise InputError(f"{corpus}: has no held-out document; give more text, in more files")
    return EvaluationPlan(
        model=model,
        tokenizer=tokenizer,
        predictors=predictors,
        batches=batches,
        skipped=skipped,
        run=run,
    )


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
