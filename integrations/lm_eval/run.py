"""`sparsecast evaluate`: perplexity, and lm-eval's tasks, in four modes.

The tasks' data is read and their requests are built once; each mode answers the same ones. With
--corpus beside --tasks, perplexities and tasks are measured on one loading of the model.
"""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from packaging.version import Version

from sparsecast.core.disk import write_result
from sparsecast.core.dry_run import refuse_dry_run
from sparsecast.core.errors import InputError
from sparsecast.core.files import check_writable_file
from sparsecast.core.messages import log
from sparsecast.core.progress import Bar, progress_bar
from sparsecast.integrations.lm_eval.scores import Scores, read_scores, show_tasks, side_by_side
from sparsecast.integrations.optional import optional
from sparsecast.predictors.config import EvaluateConfig
from sparsecast.predictors.evaluate import (
    EvaluationPlan,
    perplexity_in,
    resolve,
    show_perplexities,
    summarize,
)
from sparsecast.predictors.evaluate import evaluate as evaluate_corpus
from sparsecast.predictors.modes import MODES, NO_BUNDLE, Mode, has_bundle, in_each_mode

LEAST = "0.4.13"
BOOTSTRAP = 1_000
"""Resamples behind the standard error of a metric that has no formula, which is then known to some
2 %; lm-eval's 100,000 would take minutes in each of four modes."""


def evaluate(cfg: EvaluateConfig) -> dict[str, Any]:
    """Measure perplexities on `cfg.corpus`, lm-eval's `cfg.tasks`, or both.

    Returns:
        What --json writes.

    Raises:
        InputError: See `sparsecast.predictors.evaluate.evaluate` and `load_tasks`; lm-eval is
            missing or too old; --chat-template with a tokenizer that has none.
    """
    refuse_dry_run(cfg.dry_run, "predictors.evaluate_dry_run.forecast")
    if cfg.tasks is None:
        return evaluate_corpus(cfg)
    require_lm_eval("--tasks")
    from sparsecast.integrations.lm_eval.tasks import load_tasks

    if cfg.json is not None:
        check_writable_file(cfg.json, "--json")
    loaded = load_tasks(cfg.tasks, cfg.include_path, cfg.num_fewshot)
    plan = resolve(cfg)
    result = _measure(cfg, plan, loaded) | {"run": asdict(plan.run.record())}
    if cfg.corpus is not None:
        show_perplexities(result)
        plan.skipped.tell()
    _show(cfg, result, bundle=has_bundle(plan.model))
    if cfg.json is not None:
        write_result(cfg.json, result)
    return result


def require_lm_eval(option: str) -> None:
    """Raise `InputError` if `option` cannot work: no lm-eval, or an old one."""
    optional("lm_eval", option=option, extra="lm-eval")
    if Version(found := version("lm_eval")) < Version(LEAST):
        raise InputError(
            f"{option} needs lm-eval {LEAST} or newer, found {found}; run: pip install "
            "'sparsecast[lm-eval]'"
        )


def _measure(cfg: EvaluateConfig, plan: EvaluationPlan, loaded: dict[str, Any]) -> dict[str, Any]:
    from sparsecast.integrations.lm_eval.model import OneBosLM
    from sparsecast.integrations.lm_eval.tasks import build_requests, quiet

    if cfg.chat_template and not plan.tokenizer.chat_template:
        raise InputError(
            f"--chat-template: the tokenizer of {cfg.model} has no chat template; add the model's "
            "chat_template.jinja, or leave the option out"
        )
    with quiet():
        lm = OneBosLM(plan.model, plan.tokenizer, batch_size=cfg.batch_size)
        count = build_requests(loaded, lm, limit=cfg.limit, chat_template=cfg.chat_template)
    details: dict[str, Any] = {}
    modes = len(MODES) - (not has_bundle(plan.model))

    with progress_bar("evaluate", modes * (len(plan.batches) + count)) as progress:
        lm.set_cache_hook(_Advance(progress))

        def measure(mode: Mode) -> tuple[float | None, Scores]:
            value = None
            if plan.batches:
                value = perplexity_in(
                    mode, plan.model, plan.batches, lambda _: progress.advance(note=mode)
                )
            answered = _answer(cfg, lm, loaded)
            details.update({key: value for key, value in answered.items() if key != "samples"})
            scores = read_scores(answered)
            if mode == "dense":
                _warn(lm, [name for name in loaded["tasks"] if not scores.get(name)])
            return value, scores

        measured = in_each_mode(plan.model, plan.predictors, measure)

    result: dict[str, Any] = {"model": cfg.model}
    if plan.batches:
        values = {mode: None if pair is None else pair[0] for mode, pair in measured.items()}
        result = summarize(cfg, plan, values)
    scores = {mode: None if pair is None else pair[1] for mode, pair in measured.items()}
    return result | {
        "tasks": side_by_side(scores, details),
        "lm_eval": version("lm_eval"),
        "limit": cfg.limit,
        "chat_template": cfg.chat_template,
        "max_length": lm.max_length,
    }


def _warn(lm: Any, without_score: list[str]) -> None:
    if lm.cut:
        log.warning(
            f"{lm.cut:,} requests are longer than the model reads ({lm.max_length:,} tokens); "
            "their beginning is left out, behind BOS"
        )
    for name in without_score:
        log.warning(
            f"--tasks {name}: has no score: its metric_list names no metric that lm-eval computes "
            "for its answers"
        )


class _Advance:
    """Takes the place of lm-eval's cache of answers: each answer moves the bar."""

    def __init__(self, progress: Bar) -> None:
        self.progress = progress

    def add_partial(self, kind: str, request: object, answer: object) -> None:
        self.progress.advance()


def _answer(cfg: EvaluateConfig, lm: Any, loaded: dict[str, Any]) -> dict[str, Any]:
    """Return lm-eval's results of all tasks in the mode in which the model runs now."""
    from lm_eval.evaluator import evaluate as lm_eval_evaluate

    from sparsecast.integrations.lm_eval.tasks import quiet, seed_all

    seed_all()
    with quiet(), redirect_stdout(io.StringIO()):  # it prints which metrics it bootstraps
        results: dict[str, Any] = lm_eval_evaluate(
            lm=lm,
            task_dict=loaded,
            limit=cfg.limit,
            bootstrap_iters=BOOTSTRAP,
            log_samples=True,
            apply_chat_template=cfg.chat_template,
            fewshot_as_multiturn=cfg.chat_template,
        )
    return results


def _show(cfg: EvaluateConfig, result: dict[str, Any], *, bundle: bool) -> None:
    log.info(f"lm-eval {result['lm_eval']} on {cfg.model}", extra={"style": "italic"})
    show_tasks(result["tasks"])
    if cfg.limit is not None:
        log.warning(f"--limit {cfg.limit:g}: parts of tasks; for trying out, not for reporting")
    if cfg.corpus is None:
        for name, text in MODES.items():
            log.info(f"{name}: {NO_BUNDLE if name == 'bundle' and not bundle else text}")
