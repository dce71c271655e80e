"""Scores of predictors, as ProSparse defines them (arXiv 2402.13516, appendix C).

Counts are summed over the tokens and neurons of a layer and divided once; averages over layers are
plain means. FFN traffic is the bytes of weights read per token, relative to the dense FFN with
weights of 2 bytes (f16).

Shape letters: T tokens, F FFN width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor

MANTISSA = 11
"""Mantissa bits of a score that select its bin; a bin is at most 1/2048 of its score wide."""
LOWEST, OCTAVES = -31, 64
"""Bins cover 2^-31 to 2^33, of either sign; smaller and larger scores share the outermost bins."""
HALF = OCTAVES << MANTISSA
BINS = 2 * HALF
RECALL_STEPS = 10_000


class Counts(NamedTuple):
    """Counted entries of one layer; add them over batches, then divide once."""

    hit: int
    """Active and predicted."""
    active: int
    predicted: int
    total: int

    @property
    def recall(self) -> float:
        """Share of active entries that are predicted; 1 if nothing is active."""
        return self.hit / self.active if self.active else 1.0

    @property
    def precision(self) -> float:
        """Share of predicted entries that are active; 1 if nothing is predicted."""
        return self.hit / self.predicted if self.predicted else 1.0

    @property
    def predicted_sparsity(self) -> float:
        """Share of entries that are not predicted; 0 if there are none."""
        return 1.0 - self.predicted / self.total if self.total else 0.0

    @property
    def true_sparsity(self) -> float:
        """Share of entries that are not active; 0 if there are none."""
        return 1.0 - self.active / self.total if self.total else 0.0

    def plus(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(self, other, strict=True)))


def sums_of_layers(counts: Sequence[Counts], experts: int) -> list[Counts]:
    """Add up the counts of each layer's experts; those of a dense model are its layers' already."""
    each = max(1, experts)
    return [
        Counts(*map(sum, zip(*counts[first : first + each], strict=True)))
        for first in range(0, len(counts), each)
    ]


def count(predicted_TF: Tensor, active_TF: Tensor) -> Counts:
    """Count one batch of bool masks, both (T, F)."""
    parts = (predicted_TF & active_TF, active_TF, predicted_TF)
    # One tensor, because a GPU is waited for at every number that is asked for.
    hit, active, predicted = torch.stack([part.count_nonzero() for part in parts]).tolist()
    return Counts(hit=hit, active=active, predicted=predicted, total=active_TF.numel())


class Traffic(NamedTuple):
    """Bytes of weights read per token, relative to the dense FFN; lower is better, 1.0 is dense."""

    traffic: float
    """PowerInfer: the predictor, then all weights of every predicted neuron."""
    cascade: float
    """The predictor, the gate of predicted neurons, the other matrices where the gate fires."""
    exact: float
    """No predictor: the dense gate, the other matrices where it fires."""
    oracle: float
    """A perfect predictor that takes no bytes."""


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
        matrices: Weight matrices of the FFN: 3 with a gate, 2 without.
        predictor_bits: Stored bits per predictor weight: f16 16, q8_0 8.5, q4_0 4.5.
    """
    size = rank * (hidden_size + ffn_width) * predictor_bits
    return traffic_beside(
        size / (matrices * hidden_size * ffn_width * 16.0),
        matrices=matrices,
        recall=recall,
        predicted_sparsity=predicted_sparsity,
        true_sparsity=true_sparsity,
    )


def traffic_beside(
    predictor: float,
    *,
    matrices: int,
    recall: float,
    predicted_sparsity: float,
    true_sparsity: float,
) -> Traffic:
    """FFN traffic of one layer, given the predictor's share of the FFN's bytes."""
    m, fired = matrices, 1.0 - true_sparsity
    load = 1.0 - predicted_sparsity
    return Traffic(
        traffic=predictor + load,
        cascade=predictor + (load + (m - 1) * recall * fired) / m,
        exact=(1 + (m - 1) * fired) / m,
        oracle=fired,
    )


class TokenRecalls:
    """Recalls of single tokens, rounded to 1 / `RECALL_STEPS`.

    Memory: `RECALL_STEPS` + 1 integers, for any number of tokens.
    """

    def __init__(self) -> None:
        self.tokens = np.zeros(RECALL_STEPS + 1, dtype=np.int64)

    def add(self, predicted_TF: Tensor, active_TF: Tensor) -> None:
        """A token with nothing active has recall 1."""
        active_T = active_TF.sum(1)
        hit_T = (predicted_TF & active_TF).sum(1)
        recall_T = torch.where(active_T > 0, hit_T.double() / active_T.clamp_min(1), 1.0)
        place_T = (recall_T * RECALL_STEPS).round().long()
        self.tokens += torch.bincount(place_T, minlength=RECALL_STEPS + 1).cpu().numpy()

    def percentile(self, percent: float) -> float:
        """The smallest recall that at least `percent` % of the tokens do not exceed."""
        below = self.tokens.cumsum()
        return float(np.flatnonzero(100 * below >= percent * below[-1])[0] / RECALL_STEPS)


class ScoreHistogram:
    """Active and inactive entries of one layer, counted by score in `BINS` fixed bins.

    A bin is the leading bits of the score as a float32, so bins keep the order of scores and have
    the same relative width at any scale; thresholds are exact up to one bin.

    Memory: 2 * `BINS` integers (4 MB) where the scores are, and as many on the CPU once it is
    asked, for any number of tokens.
    """

    def __init__(self) -> None:
        self._both: Tensor | None = None
        self._read: np.ndarray | None = None

    def add(self, score_TF: Tensor, active_TF: Tensor) -> None:
        # One pass for both classes: active entries count in the upper half.
        place = _bin(score_TF).add_(active_TF, alpha=BINS).flatten()
        self._add(torch.bincount(place, minlength=2 * BINS))

    def plus(self, other: ScoreHistogram) -> None:
        """Add the entries of another histogram."""
        if other._both is not None:
            self._add(other._both.clone())

    def _add(self, both: Tensor) -> None:
        self._both = both if self._both is None else self._both.add_(both.to(self._both.device))
        self._read = None

    @property
    def active(self) -> np.ndarray:
        """Active entries of each bin, int64."""
        return self._counts()[BINS:]

    @property
    def inactive(self) -> np.ndarray:
        """Inactive entries of each bin, int64."""
        return self._counts()[:BINS]

    def _counts(self) -> np.ndarray:
        if self._both is None:
            return np.zeros(2 * BINS, dtype=np.int64)
        if self._read is None:
            self._read = self._both.cpu().numpy()
        return self._read

    def threshold_for_recall(self, recall: float) -> float:
        """The largest threshold that at least `recall` of the active entries reach; above all
        scores if nothing is active."""
        kept = self.active[::-1].cumsum()[::-1]
        if not kept[0]:
            return _edge(1 + int(np.flatnonzero(self.inactive).max(initial=-1)))
        return _edge(int(np.flatnonzero(kept >= recall * kept[0])[-1]))

    def threshold_for_sparsity(self, sparsity: float) -> float:
        """The smallest threshold that at least `sparsity` of all entries stay below."""
        below = np.concatenate([[0], (self.active + self.inactive).cumsum()])
        return _edge(int(np.flatnonzero(below >= sparsity * below[-1])[0]))

    def at(self, threshold: float) -> tuple[float, float]:
        """(recall, predicted sparsity) at a threshold from one of the two methods above."""
        index = BINS if threshold >= _edge(BINS) else int(_bin(torch.tensor(threshold)))
        hit, active = self.active[index:].sum(), self.active.sum()
        whole = self.active + self.inactive
        return float(hit / active) if active else 1.0, float(whole[:index].sum() / whole.sum())

    def curve(self, points: int = 200) -> list[tuple[float, float]]:
        """(recall, predicted sparsity) from the lowest threshold to the highest."""
        kept = np.concatenate([self.active[::-1].cumsum()[::-1], [0]]) / max(1, self.active.sum())
        whole = self.active + self.inactive
        skipped = np.concatenate([[0], whole.cumsum()]) / max(1, whole.sum())
        wanted = np.linspace(0, 1, points)
        index = np.unique(np.searchsorted(skipped, wanted).clip(0, BINS))
        return [(float(kept[i]), float(skipped[i])) for i in index]

    def roc_auc(self) -> float | None:
        """None if one class is absent."""
        return self._ranking(roc_auc_score)

    def average_precision(self) -> float | None:
        """None if one class is absent."""
        return self._ranking(average_precision_score)

    def _ranking(self, score: Callable[..., float]) -> float | None:
        """Call a scikit-learn metric, with all entries of a bin tied."""
        if not self.active.any() or not self.inactive.any():
            return None
        bins = np.flatnonzero(self.active + self.inactive)
        return float(
            score(
                np.repeat([0, 1], len(bins)),
                np.concatenate([bins, bins]),
                sample_weight=np.concatenate([self.inactive[bins], self.active[bins]]),
            )
        )


def _bin(score: Tensor) -> Tensor:
    """Bin of each score, int32. The bits of a float32 grow with its magnitude."""
    bits = (score.float() + 0.0).view(torch.int32)  # -0.0 + 0.0 is 0.0
    step = (bits & 0x7FFFFFFF).bitwise_right_shift_(23 - MANTISSA)
    step.sub_((127 + LOWEST) << MANTISSA).clamp_(0, HALF - 1)
    # Below zero, step s becomes -1 - s, which is ~s; the arithmetic shift spreads the sign bit.
    return step.bitwise_xor_(bits >> 31).add_(HALF)


def _edge(index: int) -> float:
    """The lowest score of a bin, as a float32; for `BINS`, the first score above all bins."""
    step = index - HALF if index >= HALF else HALF - index
    bits = (step + ((127 + LOWEST) << MANTISSA)) << (23 - MANTISSA)
    if index >= HALF:
        return float(np.uint32(bits).view(np.float32)) if step else 0.0
    return -float(np.uint32(bits - 1).view(np.float32))
