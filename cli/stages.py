"""The commands: purpose, dataclass of options, and function of each.

Both are named by import path and loaded on demand, so `sparsecast --help` imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Stage:
    """One command."""

    help: str
    config: str
    run: str
    positional: str | None = None
    """The field that is given without its name."""
    dry_run: str | None = None
    """The function of --dry-run, where it is not the stage's own."""
    standalone: bool = False
    """It needs no other package, so that none is imported for it: it prints by itself."""


STAGES = {
    "demo": Stage(
        "everything below on the model shipped with the package",
        "sparsecast.cli.demo:DemoConfig",
        "sparsecast.cli.demo:demo",
    ),
    "collect": Stage(
        "record what fires in a ReLU-sparse model over a corpus",
        "sparsecast.collect.config:CollectConfig",
        "sparsecast.collect.run:collect",
        dry_run="sparsecast.collect.dry_run:forecast",
    ),
    "train": Stage(
        "train one predictor per layer from what was recorded",
        "sparsecast.predictors.config:TrainConfig",
        "sparsecast.predictors.train:train",
        dry_run="sparsecast.predictors.train_dry_run:forecast",
    ),
    "report": Stage(
        "score predictors on held-out tokens, as JSON, Markdown and HTML",
        "sparsecast.predictors.config:ReportConfig",
        "sparsecast.predictors.report.run:report",
    ),
    "evaluate": Stage(
        "perplexity and lm-eval's tasks: dense, exact, and with predictors in the loop",
        "sparsecast.predictors.config:EvaluateConfig",
        "sparsecast.integrations.lm_eval.run:evaluate",
        dry_run="sparsecast.predictors.evaluate_dry_run:forecast",
    ),
    "export": Stage(
        "write the bundle that PowerInfer loads",
        "sparsecast.export.config:ExportConfig",
        "sparsecast.export.run:export",
        dry_run="sparsecast.export.dry_run:forecast",
    ),
    "verify": Stage(
        "prove a bundle against its model, and against the engine itself",
        "sparsecast.export.config:VerifyConfig",
        "sparsecast.export.verify:verify",
        positional="bundle",
    ),
    "convert": Stage(
        "write a MiniCPM or Granite as a LLaMA, proved equal",
        "sparsecast.export.to_llama.config:ConvertConfig",
        "sparsecast.export.to_llama.run:convert",
    ),
    "inspect": Stage(
        "what a model is and whether its config is true, or what a folder or file holds",
        "sparsecast.collect.inspect:InspectConfig",
        "sparsecast.export.inspect:inspect",
        positional="path",
    ),
    "push": Stage(
        "upload activations' statistics, predictors, a bundle or a sparse model to the Hub",
        "sparsecast.integrations.hub.config:PushConfig",
        "sparsecast.integrations.hub.push:push",
        positional="folder",
    ),
    "rerun": Stage(
        "run a command again as its run.json records it, and say what has changed",
        "sparsecast.cli.rerun:RerunConfig",
        "sparsecast.cli.rerun:rerun",
        positional="run",
    ),
    "doctor": Stage(
        "what this machine can do, and what to install",
        "sparsecast.cli.doctor.config:DoctorConfig",
        "sparsecast.cli.doctor.run:doctor",
        standalone=True,
    ),
    "bench collect": Stage(
        "tokens/s with and without recording, on the same batches",
        "sparsecast.cli.bench.collect:BenchCollectConfig",
        "sparsecast.cli.bench.collect:bench_collect",
    ),
    "bench train": Stage(
        "token-layers/s of training, ours and the public recipe's",
        "sparsecast.cli.bench.train:BenchTrainConfig",
        "sparsecast.cli.bench.train:bench_train",
    ),
    "bench predictors": Stage(
        "our predictors against the public recipe's, an SVD and signs: misses, bytes, traffic",
        "sparsecast.cli.bench.predictors_config:BenchPredictorsConfig",
        "sparsecast.cli.bench.predictors:bench_predictors",
    ),
    "bench export": Stage(
        "MB/s and memory of export beside cp and PowerInfer's converter",
        "sparsecast.cli.bench.export:BenchExportConfig",
        "sparsecast.cli.bench.export:bench_export",
    ),
    "bench engine": Stage(
        "tokens/s of PowerInfer's engine with predictors, with everything active, and dense",
        "sparsecast.cli.bench.engine:BenchEngineConfig",
        "sparsecast.cli.bench.engine:bench_engine",
    ),
    "bench sparsify": Stage(
        "tokens/s of sparsify's training steps beside bare Lightning's",
        "sparsecast.cli.bench.sparsify:BenchSparsifyConfig",
        "sparsecast.cli.bench.sparsify:bench_sparsify",
    ),
    "bench scaling": Stage(
        "tokens/s of collect, train and sparsify on several numbers of processes",
        "sparsecast.cli.bench.scaling:BenchScalingConfig",
        "sparsecast.cli.bench.scaling:bench_scaling",
    ),
    "bench kernels": Stage(
        "our GPU kernels and the whole sparse FFN against dense torch",
        "sparsecast.cli.bench.kernels:BenchKernelsConfig",
        "sparsecast.cli.bench.kernels:bench_kernels",
    ),
    "bench generate": Stage(
        "tokens/s of a model with its FFNs dense, exact, predicted, and as auto chooses",
        "sparsecast.cli.bench.generate:BenchGenerateConfig",
        "sparsecast.cli.bench.generate:bench_generate",
    ),
    "bench vllm": Stage(
        "start-up and tokens/s of vLLM with our plug-in, beside the same model with SiLU",
        "sparsecast.cli.bench.vllm:BenchVllmConfig",
        "sparsecast.cli.bench.vllm:bench_vllm",
    ),
    "sparsify": Stage(
        "ProSparse training: make a SiLU model sparse, or train one from a preset",
        "sparsecast.sparsify.config:SparsifyConfig",
        "sparsecast.sparsify.run:sparsify",
    ),
}


def usage() -> str:
    """Return the help of the whole program."""
    width = max(map(len, STAGES))
    lines = [f"  {name:<{width}}  {stage.help}" for name, stage in STAGES.items()]
    return "\n".join(
        [
            "usage: sparsecast STAGE [options]",
            "",
            *lines,
            "",
            "sparsecast STAGE --help lists options; --version says which release this is",
        ]
    )


def load(path: str) -> Any:
    """Import the object that `module:name` names."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)
