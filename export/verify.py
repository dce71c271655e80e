"""The verify stage: check a bundle against its model, its predictors and the engine."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table
from rich.text import Text

from sparsecast.core.disk import write_result
from sparsecast.core.errors import InputError
from sparsecast.core.files import check_writable_file
from sparsecast.core.messages import log, show
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.families import refuse_experts
from sparsecast.core.models.location import find_local
from sparsecast.export.bundle import bundle_file
from sparsecast.export.checks.base import Check
from sparsecast.export.checks.predictors import predictor_manifest
from sparsecast.export.checks.run import VerifyPlan, VerifyResult, check_bundle
from sparsecast.export.config import VerifyConfig
from sparsecast.export.engine.process import binary
from sparsecast.export.read.reader import GGUFFile
from sparsecast.predictors.manifest import number


def verify(cfg: VerifyConfig) -> VerifyResult:
    """Run every check that applies, print a table and return the result.

    A damaged file fails checks; it does not raise.

    Raises:
        InputError: No bundle there, a model that cannot be loaded, no engine binary, no text.
    """
    path = bundle_file(cfg.bundle)
    if cfg.json is not None:
        check_writable_file(cfg.json, "--json")
    if cfg.engine is not None:
        for name in ("perplexity", "server"):
            binary(cfg.engine, name)
    result = VerifyResult()
    try:
        file = GGUFFile(path)
    except InputError as error:
        result.checks.append(Check("container", False, str(error)))
    else:
        result.checks.append(Check("container", True, f"{len(file.entries)} tensors, all inside"))
        check_bundle(plan_verify(cfg, file), result)
    _print(path, result)
    if cfg.json is not None:
        write_result(cfg.json, result.as_json())
    return result


def plan_verify(cfg: VerifyConfig, file: GGUFFile) -> VerifyPlan:
    """Find the source model and FATReLU's threshold.

    Raises:
        InputError: --model names no model.
    """
    checkpoint, reason = _source_model(cfg.model, file)
    exported = number(file.keys.get("sparsecast.activation_threshold"))
    return VerifyPlan(
        file=file,
        checkpoint=checkpoint,
        no_checkpoint=reason,
        threshold=exported if cfg.activation_threshold is None else cfg.activation_threshold,
        engine=cfg.engine,
        corpus=cfg.corpus,
        tokens=cfg.tokens,
        max_increase=cfg.max_perplexity_increase,
    )


def _source_model(model: str | None, file: GGUFFile) -> tuple[Checkpoint | None, str]:
    """Return the source model, or None and the reason why there is none to compare with."""
    if model is not None:
        given = Checkpoint(model)
        why = "no bundle is of one; give --model the model that the bundle was exported from"
        refuse_experts(given.config, model, why)
        return given, ""
    manifest = predictor_manifest(file)
    if not manifest:
        return None, "the bundle does not name its model; give --model"
    model = str(manifest.get("model"))
    if file.keys.get("sparsecast.model_fingerprint") not in (None, manifest.get("fingerprint")):
        return None, f"the predictors are of {model}, the file is of another model; give --model"
    if find_local(model) is None:
        return None, f"{model} is not a folder here; give --model"
    checkpoint = Checkpoint(model)
    if checkpoint.fingerprint != manifest.get("fingerprint"):
        return None, f"{model} now holds another model; give --model"
    return checkpoint, ""


def _print(path: Path, result: VerifyResult) -> None:
    table = Table(title=str(path), title_justify="left")
    for column in ("check", "", "detail"):
        table.add_column(column)
    for check in result.checks:
        mark = Text("ok", style="green") if check.ok else Text("FAILED", style="red")
        table.add_row(check.name, mark, check.detail)
    show(table)
    if result.text is not None:
        note = f"perplexities, logits and tokens were computed on {result.text}"
        if result.text.endswith(" of builtin"):
            note += "; --corpus selects another text"
        log.info(note)
    failed = sum(not check.ok for check in result.checks)
    if failed:
        log.error(f"{failed} of {len(result.checks)} checks failed")
    else:
        log.info("all good", extra={"style": "green"})
