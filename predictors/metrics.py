"""Scores of a predictor, by the definitions of ProSparse (arXiv 2402.13516, appendix C).

Counts are summed over tokens and neurons of a layer and divided once; averages over layers are
plain means. FFN traffic counts bytes of weights read per token, relative to the dense FFN's, with
FFN weights of 2 bytes (f16).

Shape letters: T tokens, F FFN width.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

BINS = 1 << 15


class Counts(NamedTuple):
    """Entries of one layer. Add them across batches, then divide once."""

    hit: int
    """Active and predicted."""
    active: int
    predicted: int
    total: int

    @property
    def recall(self) -> float:
        """1 when nothing is active."""
        return self.hit / self.active if self.active else 1.0

    @property
    def precision(self) -> float:
        """1 when nothing is predicted."""
        return self.hit / self.predicted if self.predicted else 1.0

    @property
    def predicted_sparsity(self) -> float:
        return 1.0 - self.predicted / self.total

    @property
    def true_sparsity(self) -> float:
        return 1.0 - self.active / self.total

    def plus(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(self, other, strict=True)))


def count(predicted_TF: Tensor, active_TF: Tensor) -> Counts:
    """Count one batch of bool masks of one shape."""
    return Counts(
        hit=int((predicted_TF & active_TF).sum()),
        active=int(active_TF.sum()),
        predicted=int(predicted_TF.sum()),
        total=active_TF.numel(),
    )


class Traffic(NamedTuple):
    """Bytes read per token over those of the dense FFN; lower is better, 1.0 is dense."""

    traffic: float
    """PowerInfer: predictor, then every predicted neuron whole."""
    cascade: float
    """Predictor, gate of the predicted neurons, the other matrices where the gate fired."""
    exact: float
    """No predictor: dense gate, the other matrices where it fired."""
    oracle: float
    """A perfect predictor that costs nothing."""


def traffic(
    *,
    rank: int,
    hidden_size: int,
    ffn_width: int,
    matrices: int,
    recall: float,
    predicted_sparsity: float,
    true_sparsity: float,
    predictor_bits: float = 16.0,
) -> Traffic:
    """FFN traffic of one layer.

    Args:
        matrices: m, 3 gated and 2 not.
        predictor_bits: Stored bits per predictor weight: f16 16, q8_0 8.5, q4_0 4.5.
    """
    m, fired = matrices, 1.0 - true_sparsity
    size = rank * (hidden_size + ffn_width) * predictor_bits
    predictor = size / (m * hidden_size * ffn_width * 16.0)
    load = 1.0 - predicted_sparsity
    return Traffic(
        traffic=predictor + load,
        cascade=predictor + (load + (m - 1) * recall * fired) / m,
        exact=(1 + (m - 1) * fired) / m,
        oracle=fired,
    )


class ScoreHistogram:
    """Active and inactive entries of one layer by score, over `BINS` fixed bins.

    Scores in (-inf, inf) are squashed by s / (1 + |s|), which keeps their order, so cuts are exact
    up to one bin. Memory: 2 * BINS integers, for any number of tokens.
    """

    def __init__(self) -> None:
        self.active = np.zeros(BINS, dtype=np.int64)
        self.inactive = np.zeros(BINS, dtype=np.int64)

    def add(self, score_TF: Tensor, active_TF: Tensor) -> None:
        place = ((score_TF / (1 + score_TF.abs()) + 1) * (BINS / 2)).long().clamp_(0, BINS - 1)
        # One pass over both classes: an active entry counts in the upper half.
        both = (
            torch.bincount((place + BINS * active_TF).flatten(), minlength=2 * BINS).cpu().numpy()
        )
        self.inactive += both[:BINS]
        self.active += both[BINS:]

    def cut_for_recall(self, recall: float) -> float:
        """The largest cut at which at least `recall` of the active entries reach it."""
        kept = self.active[::-1].cumsum()[::-1]
        enough = np.flatnonzero(kept >= recall * max(1, kept[0]))
        return _edge(int(enough[-1]) if len(enough) else 0)

    def cut_for_sparsity(self, sparsity: float) -> float:
        """The smallest cut below which at least `sparsity` of all entries stay."""
        below = np.concatenate([[0], (self.active + self.inactive).cumsum()])
        return _edge(int(np.flatnonzero(below >= sparsity * below[-1])[0]))

    def at(self, cut: float) -> tuple[float, float]:
        """(recall, predicted sparsity) at a cut that one of the two methods above gave."""
        index = round((cut / (1 + abs(cut)) + 1) * BINS / 2)
        hit, active = self.active[index:].sum(), self.active.sum()
        whole = self.active + self.inactive
        return float(hit / active) if active else 1.0, float(whole[:index].sum() / whole.sum())

    def curve(self, points: int = 200) -> list[tuple[float, float]]:
        """(recall, predicted sparsity) from the lowest cut to the highest."""
        kept = np.concatenate([self.active[::-1].cumsum()[::-1], [0]]) / max(1, self.active.sum())
        whole = self.active + self.inactive
        skipped = np.concatenate([[0], whole.cumsum()]) / max(1, whole.sum())
        wanted = np.linspace(0, 1, points)
        index = np.unique(np.searchsorted(skipped, wanted).clip(0, BINS))
        return [(float(kept[i]), float(skipped[i])) for i in index]

    def roc_auc(self) -> float | None:
        """None when one class is absent."""
        if not self.active.any() or not self.inactive.any():
            return None
        bins = np.arange(BINS)
        return float(
            roc_auc_score(
                np.repeat([0, 1], BINS),
                np.concatenate([bins, bins]),
                sample_weight=np.concatenate([self.inactive, self.active]),
            )
        )


def _edge(index: int) -> float:
    """The score at the lower edge of a bin."""
    squashed = index * 2 / BINS - 1
    limit = 1 - 1e-6
    squashed = min(max(squashed, -limit), limit)
    return squashed / (1 - abs(squashed))
