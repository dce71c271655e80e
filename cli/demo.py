"""`sparsecast demo`: every stage in a row, on the shipped model and the builtin corpus."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.rule import Rule
from rich.text import Text

from sparsecast.collect.config import CollectConfig
from sparsecast.collect.run import collect
from sparsecast.core.messages import log, show
from sparsecast.core.models.location import TINY_PROSPARSE
from sparsecast.core.options import validate_fields
from sparsecast.core.text.corpus import LongDocuments
from sparsecast.export.config import ExportConfig, VerifyConfig
from sparsecast.export.run import export
from sparsecast.export.verify import verify
from sparsecast.predictors.config import EvaluateConfig, ReportConfig, TrainConfig
from sparsecast.predictors.evaluate import evaluate
from sparsecast.predictors.report.run import report
from sparsecast.predictors.train import train


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Take the shipped model to a bundle that PowerInfer runs; nothing is downloaded."""

    out: Path = Path("sparsecast-demo")
    """Folder for activations, predictors, report and bundle; what is finished there is kept."""

    tokens: int = 200_000
    """Tokens to record."""

    engine: Path | None = None
    """Build folder of PowerInfer: also run the bundle through the engine itself."""

    def __post_init__(self) -> None:
        validate_fields(self, tokens=60)


def demo(cfg: DemoConfig) -> bool:
    """Run collect, train, evaluate, report, export and verify; True when verify passed."""
    model = str(TINY_PROSPARSE)
    acts, predictors = cfg.out / "activations", cfg.out / "predictors"
    bundle, evaluation = cfg.out / "bundle", cfg.out / "evaluate.json"
    _step("collect: what do the predictors see, and which neurons fire?")
    long: LongDocuments = (
        "cut"  # builtin's files are long: their beginnings are as many tokens from more files
    )
    collect(
        CollectConfig(
            model=model, corpus="builtin", out=acts, tokens=cfg.tokens, long_documents=long
        )
    )
    _step("train: one predictor per layer, all layers at once")
    train(TrainConfig(activations=acts, out=predictors))
    _step("evaluate: perplexity with the predictors in the loop")
    evaluate(
        EvaluateConfig(
            model=model,
            predictors=predictors,
            corpus="builtin",
            json=evaluation,
            long_documents=long,
        )
    )
    _step("report: recall and predicted sparsity on held-out documents")
    report(
        ReportConfig(
            predictors=predictors, activations=acts, out=cfg.out / "report", evaluation=evaluation
        )
    )
    _step("export: the bundle that PowerInfer loads")
    export(ExportConfig(model=model, predictors=predictors, out=bundle, activations=acts))
    _step("verify: read it back and prove it")
    ok = verify(VerifyConfig(bundle=bundle, model=model, engine=cfg.engine)).ok
    log.info(f"\nreport  {cfg.out / 'report' / 'report.html'}")
    log.info(f"bundle  {bundle}; its README.md has the command that runs it")
    return ok


def _step(title: str) -> None:
    show(Rule(Text(title, style="bold"), align="left"))
