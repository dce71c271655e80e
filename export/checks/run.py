"""Every check of a bundle, in the order in which verify shows them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.loading import load_model
from sparsecast.export.checks.base import Check
from sparsecast.export.checks.calibration import (
    bound_of,
    calibrated,
    check_decisions,
    check_perplexity,
    measure,
)
from sparsecast.export.checks.engine import check_engine
from sparsecast.export.checks.engine_gpu import GPURun, check_gpu_engine
from sparsecast.export.checks.engine_text import EnginePerplexity
from sparsecast.export.checks.folders import check_activation_folder, check_card
from sparsecast.export.checks.gpu_split import check_gpu_split
from sparsecast.export.checks.header import check_header
from sparsecast.export.checks.logits import check_logits, degenerate, model_logits, with_relu
from sparsecast.export.checks.metadata import check_metadata
from sparsecast.export.checks.predictors import check_predictors
from sparsecast.export.checks.sources import Source
from sparsecast.export.checks.tensors import check_finite, check_tensors
from sparsecast.export.checks.tokens import check_other_tokens, check_tokens, recorded
from sparsecast.export.checks.values import check_values
from sparsecast.export.checks.vocab import check_vocabulary
from sparsecast.export.checks.vocab_source import check_pieces
from sparsecast.export.engine.emulator import Emulator
from sparsecast.export.engine.gpu import is_gpu_build
from sparsecast.export.engine.process import EngineError, binary
from sparsecast.export.engine.protocol import HeldOutText, losses, read_held_out
from sparsecast.export.read.other_tokens import model_ids
from sparsecast.export.read.reader import GGUFFile
from sparsecast.export.read.vocab import tokenizer_of
from sparsecast.predictors.manifest import PredictorManifest

FILE_CHECKS = (check_metadata, check_vocabulary, check_tensors, check_finite)
"""Checks of the file alone; nothing else can run on a file that fails one of them."""


@dataclass(frozen=True, kw_only=True)
class VerifyPlan:
    """One verification: the file, what to compare it with and the text to evaluate."""

    file: GGUFFile
    checkpoint: Checkpoint | None
    """The source model."""
    no_checkpoint: str
    """Why there is no source model; empty where there is one."""
    threshold: float | None
    """FATReLU's threshold, for a config that has lost it."""
    engine: Path | None
    """Build folder of PowerInfer."""
    corpus: str
    tokens: int
    """Held-out tokens of the corpus."""
    max_increase: float | None
    """Largest relative increase of perplexity; None: what the calibration allows."""


@dataclass
class VerifyResult:
    """All checks, in the order they ran."""

    checks: list[Check] = field(default_factory=list)
    engine: EnginePerplexity | None = None
    gpu: list[GPURun] | None = None
    """With a GPU build: none, half and all neurons on the GPU."""
    text: str | None = None
    """The text behind perplexities, logits and tokens; None where a check failed before."""

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    def as_json(self) -> dict[str, object]:
        return {
            "ok": self.ok,
            "checks": [asdict(check) for check in self.checks],
            "engine": None if self.engine is None else self.engine._asdict(),
            "gpu": None if self.gpu is None else [run._asdict() for run in self.gpu],
            "text": self.text,
        }


def check_bundle(plan: VerifyPlan, result: VerifyResult) -> None:
    """Run every check that applies and add it to `result`.

    Raises:
        InputError: A model that cannot be loaded, no engine binary, no text.
    """
    checks, file = result.checks, plan.file
    for check in FILE_CHECKS:
        checks.append(check(file))
        if not result.ok:
            return
    found, calibration = check_predictors(file, plan.checkpoint, plan.threshold)
    checks += found
    checks += _check_neighbors(file)
    checks += _check_source(plan)
    # Without a source model the text is evaluated even after a failed check.
    if plan.checkpoint is not None and not result.ok:
        return

    loaded = _source_model(plan)
    text, found = _read_text(plan, loaded)
    checks += found
    result.text = f"{text.ids_NS.numel():,} held-out tokens of {plan.corpus}"
    emulator = Emulator(file)
    found, model_NS = _check_logits(emulator, text, loaded)
    checks += found
    checks += _check_calibration(plan, emulator, calibration, text.ids_NS, model_NS)
    if plan.engine is None:
        return
    try:
        gpu = is_gpu_build(binary(plan.engine, "perplexity"))
    except EngineError as error:
        checks.append(Check("engine", False, str(error)))
        return
    if gpu:
        found, result.engine, result.gpu = check_gpu_engine(plan.engine, emulator, text)
    else:
        found, result.engine = check_engine(plan.engine, emulator, text)
    checks += found


def _check_neighbors(file: GGUFFile) -> list[Check]:
    """Check the counts, the split and the card in the file's folder."""
    folder = file.path.parent
    counts = check_activation_folder(file, folder / "activation")
    return [counts, *check_gpu_split(file, folder), *check_card(folder)]


def _check_source(plan: VerifyPlan) -> list[Check]:
    """Compare header, vocabulary and every tensor with the source model's files."""
    if plan.checkpoint is None:
        return [Check("values", True, f"not checked: {plan.no_checkpoint}")]
    source = Source(plan.checkpoint, plan.file)
    return [check_header(source), check_pieces(source), *check_values(source)]


def _source_model(plan: VerifyPlan) -> tuple[Any, Any] | None:
    """Load the source model and its tokenizer where they are at hand."""
    if plan.checkpoint is None:
        return None
    return load_model(
        plan.checkpoint.source, device="cpu", dtype="float32", activation_threshold=plan.threshold
    )


def _read_text(plan: VerifyPlan, loaded: tuple[Any, Any] | None) -> tuple[HeldOutText, list[Check]]:
    """Read the held-out text, and compare its tokens with those of the source model.

    Where the engine makes other tokens of text, the text's ids are the model's.
    """
    tokenizer = tokenizer_of(plan.file)
    try:
        told = recorded(plan.file)
    except ValueError as error:
        wrong = [Check("other tokens", False, str(error))]
        return read_held_out(plan.corpus, tokenizer, plan.tokens), wrong
    if loaded is None:
        return read_held_out(plan.corpus, tokenizer, plan.tokens), []
    own = loaded[1]
    encode = None if told is None else model_ids(own)
    text = read_held_out(plan.corpus, tokenizer, plan.tokens, encode)
    checks = [check_tokens(own, tokenizer, text.docs, told=told is not None)]
    if told is not None:
        checks.append(check_other_tokens(own, tokenizer, told))
    return text, checks


def _check_logits(
    emulator: Emulator, text: HeldOutText, loaded: tuple[Any, Any] | None
) -> tuple[list[Check], Tensor | None]:
    """Compare logits, with every neuron active, with the source model.

    Returns:
        The checks, and the source model's losses where it is at hand.
    """
    if loaded is None:
        reason = degenerate(emulator.logits(text.ids_NS[:1]))
        return [Check("logits", reason is None, reason or "finite and not constant")], None
    model = loaded[0]
    checks = [check_logits(emulator, with_relu(model), text.ids_NS)]
    return checks, losses(lambda ids: model_logits(model, ids), text.ids_NS)


def _check_calibration(
    plan: VerifyPlan,
    emulator: Emulator,
    calibration: PredictorManifest | None,
    ids_NS: Tensor,
    model_NS: Tensor | None,
) -> list[Check]:
    """Compare what the predictors decide and cost on the text with their calibration.

    Args:
        model_NS: The source model's losses, where it is at hand.
    """
    threshold = plan.threshold or 0.0
    bundle_NS = losses(emulator.logits, ids_NS)
    decisions, stored_NS = measure(plan.file, threshold, ids_NS)
    bound = None
    if calibration is not None and plan.max_increase is None:
        rates = calibrated(calibration, decisions)
        bound = bound_of(plan.file, threshold, rates, ids_NS, bundle_NS, stored_NS)
    return [
        check_decisions(decisions, calibration, ids_NS.numel()),
        check_perplexity(bundle_NS, stored_NS, model_NS, bound=bound, allowed=plan.max_increase),
    ]
