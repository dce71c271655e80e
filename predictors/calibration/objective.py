"""What predictors are calibrated to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line reads objectives without importing torch
    from sparsecast.predictors.metrics import ScoreHistogram

DEFAULT_RECALL = 0.95


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The operating point of all layers; at most one of the optional fields is set."""

    recall: float = DEFAULT_RECALL
    """Recall of each layer. Under a traffic or perplexity objective, ranks and best epochs are
    still chosen at this recall."""
    sparsity: float | None = None
    """Predicted sparsity of each layer."""
    perplexity: float | None = None
    """Largest relative increase of perplexity on the calibration documents."""
    traffic: float | None = None
    """Mean FFN traffic over layers."""

    def epoch_score(self, histogram: ScoreHistogram) -> float:
        """Score one layer's epoch, higher is better: recall at the target sparsity if there is one,
        else predicted sparsity at the target recall."""
        if self.sparsity is not None:
            return histogram.at(histogram.threshold_for_sparsity(self.sparsity))[0]
        return histogram.at(histogram.threshold_for_recall(self.recall))[1]
