"""`sparsecast report`: score predictors on held-out tokens, and write JSON, Markdown and HTML."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from sparsecast.collect.store.firing import check_firing
from sparsecast.collect.store.store import ActivationStore
from sparsecast.core.disk import explain_full_disk, write_result
from sparsecast.core.errors import InputError
from sparsecast.core.files import (
    check_new_folder,
    check_writable_file,
    json_text,
    new_folder,
    write_text,
)
from sparsecast.core.lock import lock_folder
from sparsecast.core.options import command_of, short_repr
from sparsecast.core.run_record import RUN, Run, begin_run
from sparsecast.predictors.checkpoint import PredictorSet, load_predictors
from sparsecast.predictors.compatibility import check_model
from sparsecast.predictors.config import ReportConfig
from sparsecast.predictors.recorded_model import check_recorded
from sparsecast.predictors.report.html import page
from sparsecast.predictors.report.plots import (
    curves,
    data_needed,
    recall_and_sparsity,
    traffic_bars,
)
from sparsecast.predictors.report.result import (
    by_train_tokens,
    folder_entry,
    read_evaluation,
    sign_entry,
    summarize,
)
from sparsecast.predictors.report.score import SPLIT, means, score_layers, score_sign
from sparsecast.predictors.report.text import (
    data_rows,
    expert_rows,
    layer_rows,
    markdown,
    show_report,
    side_rows,
)
from sparsecast.predictors.report.wording import verdict

Other = Path | Literal["sign"]
"""What predictors are compared with: a predictor folder, or SparseInfer's rule."""
AFTER = "the scores are on the screen; make room and run the same command again"


@dataclass(frozen=True, kw_only=True)
class ReportPlan:
    """One report, its inputs opened and checked against each other."""

    out: Path
    json: Path | None
    store: ActivationStore
    folder: Path
    """Folder of `predictors`."""
    predictors: PredictorSet
    others: list[Other] | None
    """None if no comparison was asked for."""
    model: str | None
    """The recorded model, for SparseInfer's rule."""
    evaluation: dict[str, Any]
    """See `read_evaluation`."""
    command: str
    """The command line of this report without its outputs."""
    run: Run
    """What run.json says of the report."""


def report(cfg: ReportConfig) -> dict[str, Any]:
    """Score predictors and write the report; an earlier one under `cfg.out` is replaced.

    Memory: see `score_layers`; the predictors of `cfg.predictors` and of one other folder at a
    time; for sign, see `sign_rules`.

    Returns:
        What report.json holds.

    Raises:
        InputError: No predictors, activations or model there, or they belong to different models;
            `cfg.out` holds other files than a report's, cannot be written, or is being written by
            another report.
        OSError: The report could not be written; its scores are on the screen.
    """
    out = check_new_folder(
        cfg.out, replaces="report.json", beside=_earlier_files(cfg.out, cfg.json)
    )
    if cfg.json is not None:
        check_writable_file(cfg.json, "--json")
    date = today()
    with lock_folder(out, "report"):
        plan = _resolve(cfg, date)
        scores = score_layers(plan.predictors, plan.store, str(plan.folder))
        result = summarize(scores, plan.predictors, plan.store) | plan.evaluation
        result |= {
            "corpus": plan.store.manifest.corpus,
            "date": date,
            "version": version("sparsecast"),
            "command": plan.command,
            "verdict": verdict(result),
        }
        if plan.others is not None:
            own = folder_entry(plan.folder, plan.predictors, result["mean"])
            result["against"] = [own, *(_score_other(plan, other) for other in plan.others)]
        show_report(result)
        _write(plan, result, [score.curve for score in scores])
    return result


def _resolve(cfg: ReportConfig, date: str) -> ReportPlan:
    """Open the inputs, and refuse those that do not belong together."""
    store = ActivationStore(cfg.activations)
    check_firing(store.stats(), store.manifest.ffns, str(cfg.activations), [SPLIT])
    predictors = _load_matching(cfg.predictors, store)
    others = {item if item == "sign" else item.resolve(): item for item in cfg.against or []}
    others.pop(cfg.predictors.resolve(), None)
    for item in others.values():
        if item == "sign":
            assert cfg.model is not None
            check_recorded(cfg.model, store)
        else:
            _load_matching(item, store, layers=predictors.layer_count)
    return ReportPlan(
        out=cfg.out,
        json=cfg.json,
        store=store,
        folder=cfg.predictors,
        predictors=predictors,
        others=None if cfg.against is None else list(others.values()),
        model=cfg.model,
        evaluation=read_evaluation(cfg.evaluation),
        command=command_of("report", cfg, leave_out=("out", "json")),
        run=begin_run("report", cfg, date=date),
    )


def _load_matching(path: Path, store: ActivationStore, layers: int | None = None) -> PredictorSet:
    """Load predictors, and refuse those of another model, input or activation than the store's.

    Args:
        layers: How many there must be; any number unless given.
    """
    predictors, recorded = load_predictors(path), store.manifest
    check_model(
        predictors,
        str(path),
        replace(recorded.model_shape, layers=layers or predictors.layer_count),
        fingerprint=recorded.fingerprint,
        model=f"{store.folder} ({recorded.model})",
    )
    if (manifest := predictors.manifest) is not None:
        pairs = {
            "input": (manifest.convention, recorded.convention),
            "activation": (str(manifest.rule), str(recorded.rule)),
            "number of FFN matrices": (manifest.ffn_matrices, recorded.ffn_matrices),
        }
        if wrong := [f"{name} {a}, not {b}" for name, (a, b) in pairs.items() if a != b]:
            raise InputError(
                f"{path}: was trained for another use than {store.folder} was recorded for: "
                f"{'; '.join(wrong)}; give activations that were recorded alike"
            )
    return predictors


def _score_other(plan: ReportPlan, other: Other) -> dict[str, Any]:
    """Score one of the entries that stand beside the report's own predictors."""
    if other == "sign":
        assert plan.model is not None
        return sign_entry(score_sign(plan.model, plan.predictors, plan.store), plan.store)
    predictors = _load_matching(other, plan.store)
    return folder_entry(other, predictors, means(score_layers(predictors, plan.store, str(other))))


def today() -> str:
    """Date of the report, in UTC: today, or that of SOURCE_DATE_EPOCH, with which another run gives
    the same bytes on another day (https://reproducible-builds.org/specs/source-date-epoch).

    Raises:
        InputError: SOURCE_DATE_EPOCH is no time in seconds.
    """
    if (text := os.environ.get("SOURCE_DATE_EPOCH")) is None:
        return datetime.now(UTC).date().isoformat()
    if not (text.isascii() and text.isdecimal() and len(text) <= 11):
        raise InputError(
            f"SOURCE_DATE_EPOCH={short_repr(text)} in the environment: expected the seconds since "
            "1970 of the date that reports state; unset it for today"
        )
    return datetime.fromtimestamp(int(text), UTC).date().isoformat()


def _write(
    plan: ReportPlan, result: dict[str, Any], curves_of_layers: list[list[tuple[float, float]]]
) -> None:
    """Write all files; report.json, .md and .html appear in one step.

    Args:
        curves_of_layers: (recall, predicted sparsity) of each layer as its threshold rises.
    """
    layers, against = result["layers"], result["against"]
    groups = by_train_tokens(against)
    rows, side, experts = layer_rows(result), side_rows(against), expert_rows(result)
    data = {shared: data_rows(entries) for shared, entries in groups.items()}
    html = page(
        result,
        [recall_and_sparsity(layers), curves(layers, curves_of_layers), traffic_bars(layers)],
        rows,
        side,
        {shared: (data_needed(entries), data[shared]) for shared, entries in groups.items()},
        experts,
    )
    files = {
        "report.json": json_text(result),
        "report.md": markdown(result, rows, side, data, experts),
        "report.html": html,
    }
    need = sum(len(text.encode()) for text in files.values())
    earlier = _earlier_files(plan.out, plan.json)
    with (
        explain_full_disk(plan.out, need, "the report", lambda: AFTER),
        new_folder(plan.out, replaces="report.json", beside=earlier) as folder,
    ):
        for name, text in files.items():
            write_text(folder / name, text)
        plan.run.write(folder)
    if plan.json is not None:
        write_result(plan.json, result)


def _earlier_files(out: Path, json: Path | None) -> tuple[str, ...]:
    """Files beside report.json that an earlier report may have left in `out`."""
    inside = json is not None and json.resolve().parent == out.resolve()
    return ("report.md", "report.html", RUN, *([json.name] if json and inside else []))
