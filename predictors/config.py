"""What `sparsecast train`, `report` and `evaluate` take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparsecast.collect.errors import InputError

DEFAULT_RECALL = 0.94


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train one predictor per layer, all layers at once, and calibrate each to an objective."""

    activations: Path
    """Folder written by `sparsecast collect`."""

    out: Path
    """Folder for the predictors; it appears when complete."""

    rank: int | None = None
    """Hidden width of each predictor, two units of it a bias; unset: 3/8 of the hidden size."""

    target_recall: float | None = None
    """Recall each layer is calibrated to; unset: 0.94, if no sparsity is asked for either."""

    target_sparsity: float | None = None
    """Predicted sparsity each layer is calibrated to, instead of a recall."""

    epochs: int = 4
    """Passes over the training tokens."""

    batch_size: int = 512
    """Tokens per optimiser step, the same for all layers."""

    lr: float = 3e-3
    """Peak AdamW learning rate."""

    device: str = "auto"
    """auto, cpu or cuda."""

    seed: int = 0
    """Of initialisation and data order."""

    def __post_init__(self) -> None:
        if self.target_recall is not None and self.target_sparsity is not None:
            raise InputError("train: give --target-recall or --target-sparsity, not both")
        for name in ("target_recall", "target_sparsity"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise InputError(f"--{name.replace('_', '-')}: must be in (0, 1), got {value}")
        if self.rank is not None and self.rank < 3:
            raise InputError(f"--rank: must be at least 3 (two units are a bias), got {self.rank}")
        if self.epochs < 1 or self.lr <= 0:
            raise InputError(f"--epochs {self.epochs}, --lr {self.lr}: must both be positive")
        if self.batch_size < 32 or self.batch_size % 32:
            raise InputError(
                f"--batch-size: must be a multiple of 32, the tokens read together, got "
                f"{self.batch_size}"
            )


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Score predictors on the held-out documents: report.json, report.md and report.html."""

    predictors: Path
    """Folder written by `sparsecast train`, or a predictor repository of PowerInfer's."""

    activations: Path
    """Folder written by `sparsecast collect` from the same model."""

    out: Path
    """Folder for the report."""

    evaluation: Path | None = None
    """JSON written by `sparsecast evaluate --json`, for the change in perplexity."""

    json: Path | None = None
    """Also write report.json to this file."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Perplexity on held-out documents: dense, exact, predicted, and as the bundle computes it."""

    model: str
    """Hugging Face id or local folder of the model that the predictors belong to."""

    predictors: Path
    """Folder written by `sparsecast train`, or a predictor repository of PowerInfer's."""

    corpus: str = "builtin"
    """builtin, a .txt, .md, .jsonl or .parquet file, a folder, a glob, or name[:config][@split]."""

    tokens: int = 20_000
    """Held-out tokens to evaluate on."""

    seq_len: int = 512
    """Documents are truncated to this many tokens, BOS included."""

    batch_size: int = 8
    """Documents per forward pass."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    dtype: str = "auto"
    """auto (float32 on the CPU, else the checkpoint's), float32, float16 or bfloat16."""

    activation_threshold: float | None = None
    """FATReLU threshold, for a model whose config has lost it."""

    json: Path | None = None
    """Also write the perplexities to this file."""

    def __post_init__(self) -> None:
        for name, least in (("tokens", 2), ("seq_len", 2), ("batch_size", 1)):
            if (value := getattr(self, name)) < least:
                option = name.replace("_", "-")
                raise InputError(f"--{option}: must be at least {least}, got {value}")
