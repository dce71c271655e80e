"""Options of `sparsecast bench predictors`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparsecast.core.options import check_between, validate_fields


@dataclass(frozen=True, kw_only=True)
class BenchPredictorsConfig:
    """Compare predictors of the public recipe with ours, trained on the same activations.

    Within a limit on perplexity also with two that need no training: an SVD of the gates, and
    SparseInfer's signs of the gates. Trained predictors are kept in --out; the same command
    measures again without training.
    """

    activations: Path
    """Folder written by `sparsecast collect`."""

    model: str
    """The model that was recorded."""

    out: Path
    """Folder for the predictors that are compared."""

    other_activations: Path | None = None
    """Activations of the same model on another text, such as one of another domain: what was chosen
    on --activations is also scored on the held-out documents there."""

    perplexity: float = 0.005
    """Relative change of perplexity allowed to all, on the calibration documents."""

    epochs: int | None = None
    """Passes over the training tokens for ours; unset: --reference-epochs at the reference's rank
    and format, elsewhere the default of `sparsecast train`."""

    reference_epochs: int = 20
    """Most passes over the training tokens for the public recipe."""

    seeds: int = 1
    """Train everything with so many seeds, from 0 on, and give means."""

    device: str = "auto"
    """auto, cpu or cuda."""

    json: Path | None = None
    """Write the numbers to this file."""

    def __post_init__(self) -> None:
        validate_fields(self, epochs=1, reference_epochs=1, seeds=1)
        check_between(self, 0, 1, "perplexity")
