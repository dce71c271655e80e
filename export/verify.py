"""The stage: is this bundle what its model and predictors say, and does the engine agree?"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.table import Table
from rich.text import Text
from torch import Tensor

from sparsecast.core.errors import InputError
from sparsecast.core.files import check_writable_file, write_json
from sparsecast.core.messages import log, show
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.loading import load_model
from sparsecast.core.models.location import find_local
from sparsecast.export.bundle import bundle_file
from sparsecast.export.checks.base import (
    Check,
    check_activation_folder,
    check_card,
    check_finite,
    check_predictor_folder,
    check_traffic,
)
from sparsecast.export.checks.calibration import (
    bound_of,
    calibrated,
    check_decisions,
    check_perplexity,
    measure,
)
from sparsecast.export.checks.gpu_split import check_gpu_split
from sparsecast.export.checks.header import check_header
from sparsecast.export.checks.logits import check_logits, degenerate, model_logits, with_relu
from sparsecast.export.checks.metadata import check_metadata
from sparsecast.export.checks.predictors import check_predictor_model, foreign, made_for
from sparsecast.export.checks.sources import Source
from sparsecast.export.checks.tensors import check_tensors
from sparsecast.export.checks.values import check_values
from sparsecast.export.checks.vocab import check_vocabulary
from sparsecast.export.checks.vocab_source import check_pieces, check_tokens
from sparsecast.export.config import VerifyConfig
from sparsecast.export.engine.checks import check_engine
from sparsecast.export.engine.emulator import Emulator
from sparsecast.export.engine.process import binary
from sparsecast.export.engine.protocol import chunks_of, held_out_documents, joined, losses
from sparsecast.export.engine.text import EnginePerplexity
from sparsecast.export.read.header import header_of
from sparsecast.export.read.reader import GGUFFile
from sparsecast.export.read.vocab import FileVocabulary, tokenizer_of
from sparsecast.predictors.checkpoint import load_predictors
from sparsecast.predictors.manifest import PredictorManifest, number


@dataclass
class VerifyResult:
    """All checks, in the order they ran."""

    checks: list[Check] = field(default_factory=list)
    engine: EnginePerplexity | None = None
    text: str | None = None
    """What perplexities, logits and tokens are of; None where a check failed before they ran."""

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    def as_json(self) -> dict[str, object]:
        return {
            "ok": self.ok,
            "checks": [asdict(check) for check in self.checks],
            "engine": None if self.engine is None else self.engine._asdict(),
            "text": self.text,
        }


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
        result.checks.append(Check("container", True, f"{len(file.entries)} tensors, all inside"))
    except InputError as error:
        result.checks.append(Check("container", False, str(error)))
    else:
        _run(cfg, file, result)
    _print(path, result)
    if cfg.json is not None:
        write_json(cfg.json, result.as_json())
    return result


def _model(cfg: VerifyConfig, file: GGUFFile) -> tuple[Checkpoint | None, str]:
    """The source model, or why there is none to compare with."""
    if cfg.model is not None:
        return Checkpoint(cfg.model), ""
    manifest = made_for(file)
    if not manifest:
        return None, "the bundle does not name its model; give --model"
    model = str(manifest.get("model"))
    if file.keys.get("sparsecast.model_fingerprint") not in (None, manifest.get("fingerprint")):
        return None, f"the predictors are of {model}, the file is of another model; give --model"
    if find_local(model) is None:
        return None, f"{model} is no folder here; give --model"
    checkpoint = Checkpoint(model)
    if checkpoint.fingerprint != manifest.get("fingerprint"):
        return None, f"{model} now holds another model; give --model"
    return checkpoint, ""


def _threshold(cfg: VerifyConfig, file: GGUFFile) -> float | None:
    """FATReLU's T, which a config may have lost: as given here, or to export."""
    exported = number(file.keys.get("sparsecast.activation_threshold"))
    return exported if cfg.activation_threshold is None else cfg.activation_threshold


def _run(cfg: VerifyConfig, file: GGUFFile, result: VerifyResult) -> None:
    checks = result.checks
    checkpoint, unchecked = _model(cfg, file)
    for check in (check_metadata, check_vocabulary, check_tensors, check_finite):
        checks.append(check(file))
        if not checks[-1].ok:
            return
    threshold = _threshold(cfg, file)
    calibration = _predictors(file, checkpoint, threshold, checks)
    checks.append(check_activation_folder(file, file.path.parent / "activation"))
    checks += check_gpu_split(file, file.path.parent)
    checks += check_card(file.path.parent)
    if checkpoint is None:
        checks.append(Check("values", True, f"not checked: {unchecked}"))
    else:
        source = Source(checkpoint, file)
        checks += [check_header(source), check_pieces(source), *check_values(source)]
        if not result.ok:
            return

    tokenizer = tokenizer_of(file)
    docs = held_out_documents(cfg.corpus, tokenizer, cfg.tokens)
    ids_NS = chunks_of(joined(docs), tokenizer, cfg.tokens)
    result.text = f"{ids_NS.numel():,} held-out tokens of {cfg.corpus}"
    emulator = Emulator(file)
    own_NS = _numerics(checkpoint, threshold, emulator, tokenizer, docs, ids_NS, checks)
    allowed = cfg.max_perplexity_increase
    checks += _decisions(emulator, threshold or 0.0, calibration, ids_NS, own_NS, allowed)
    if cfg.engine is not None:
        found, result.engine = check_engine(cfg.engine, file, emulator, tokenizer, docs, ids_NS)
        checks += found


def _predictors(
    file: GGUFFile, checkpoint: Checkpoint | None, threshold: float | None, checks: list[Check]
) -> PredictorManifest | None:
    """Check the folder that lies beside the file; its manifest, if it is of the file's model."""
    try:
        predictors = load_predictors(file.path.parent / "predictor")
    except InputError as error:
        checks.append(Check("predictor folder", False, str(error)))
        return None
    manifest = predictors.manifest
    checks.append(check_predictor_folder(file, predictors))
    odd = foreign(file, manifest, checkpoint, threshold)
    checks += check_predictor_model(manifest, odd)
    checks += check_traffic(file, manifest)
    layers = header_of(file).layers
    return None if odd or len(predictors.layers) != layers else manifest


def _numerics(
    checkpoint: Checkpoint | None,
    threshold: float | None,
    emulator: Emulator,
    tokenizer: FileVocabulary,
    docs: list[str],
    ids_NS: Tensor,
    checks: list[Check],
) -> Tensor | None:
    """Everything active against the model; the losses of the model itself, where it is at hand."""
    if checkpoint is None:
        reason = degenerate(emulator.logits(ids_NS[:1]))
        checks.append(Check("logits", reason is None, reason or "finite and not constant"))
        return None
    model, theirs = load_model(
        checkpoint.source, device="cpu", dtype="float32", activation_threshold=threshold
    )
    checks.append(check_tokens(theirs, tokenizer, docs))
    checks.append(check_logits(emulator, with_relu(model), ids_NS))
    return losses(lambda ids: model_logits(model, ids), ids_NS)


def _decisions(
    emulator: Emulator,
    threshold: float,
    calibration: PredictorManifest | None,
    ids_NS: Tensor,
    own_NS: Tensor | None,
    allowed: float | None,
) -> list[Check]:
    """What the predictors decide and cost on the text, against their calibration."""
    file, tokens = emulator.file, ids_NS.numel()
    bundle_NS = losses(emulator.logits, ids_NS)
    decisions, stored_NS = measure(file, threshold, ids_NS)
    bound = None
    if calibration is not None and allowed is None:
        rates = calibrated(calibration, decisions)
        bound = bound_of(file, threshold, rates, ids_NS, bundle_NS, stored_NS)
    return [
        check_decisions(decisions, calibration, tokens),
        check_perplexity(bundle_NS, stored_NS, own_NS, bound=bound, allowed=allowed),
    ]


def _print(path: Path, result: VerifyResult) -> None:
    table = Table(title=str(path), title_justify="left")
    for column in ("check", "", "detail"):
        table.add_column(column)
    for check in result.checks:
        mark = Text("ok", style="green") if check.ok else Text("FAILED", style="red")
        table.add_row(check.name, mark, check.detail)
    show(table)
    if result.text is not None:
        told = f"perplexities, logits and tokens are of {result.text}"
        if result.text.endswith(" of builtin"):
            told += "; --corpus names another text"
        log.info(told)
    failed = sum(not check.ok for check in result.checks)
    if failed:
        log.error(f"{failed} of {len(result.checks)} checks failed")
    else:
        log.info("all good", extra={"style": "green"})
