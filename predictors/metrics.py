"""Scores of a predictor, by the definitions of ProSparse (arXiv 2402.13516, appendix C).

Counts are summed over tokens and neurons of a layer and divided once; averages over layers are
plain means. FFN traffic counts bytes of weights read per token, relative to the dense FFN's, with
FFN weights of 2 bytes (f16).

Shape letters: T tokens, F FFN width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor

MANTISSA = 11
"""Bits of a score's mantissa that tell bins apart: each is at most 1/2048 of its score wide."""
LOWEST, OCTAVES = -31, 64
"""Scores are told apart from 2^-31 to 2^33, of either sign; smaller and larger ones are pooled."""
HALF = OCTAVES << MANTISSA
BINS = 2 * HALF
RECALL_STEPS = 10_000


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
    """The same beside a predictor of any kind, from its share of the FFN's bytes."""
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
    """Active and inactive entries of one layer by score, over `BINS` fixed bins.

    Bins are the leading bits of the score as a float32, so they keep its order and are equally
    fine, relative to the score, at any scale; cuts are exact up to one bin. Memory: 2 * `BINS`
    integers (4 MB), for any number of tokens.
    """

    def __init__(self) -> None:
        self.active = np.zeros(BINS, dtype=np.int64)
        self.inactive = np.zeros(BINS, dtype=np.int64)

    def add(self, score_TF: Tensor, active_TF: Tensor) -> None:
        # One pass over both classes: an active entry counts in the upper half.
        place = _bin(score_TF).add_(active_TF, alpha=BINS).flatten()
        both = torch.bincount(place, minlength=2 * BINS).cpu().numpy()
        self.inactive += both[:BINS]
        self.active += both[BINS:]

    def threshold_for_recall(self, recall: float) -> float:
        """The largest cut at which at least `recall` of the active entries reach it; above all
        scores where nothing is active."""
        kept = self.active[::-1].cumsum()[::-1]
        if not kept[0]:
            return _edge(1 + int(np.flatnonzero(self.inactive).max(initial=-1)))
        return _edge(int(np.flatnonzero(kept >= recall * kept[0])[-1]))

    def threshold_for_sparsity(self, sparsity: float) -> float:
        """The smallest cut below which at least `sparsity` of all entries stay."""
        below = np.concatenate([[0], (self.active + self.inactive).cumsum()])
        return _edge(int(np.flatnonzero(below >= sparsity * below[-1])[0]))

    def at(self, cut: float) -> tuple[float, float]:
        """(recall, predicted sparsity) at a cut that one of the two methods above gave."""
        index = BINS if cut >= _edge(BINS) else int(_bin(torch.tensor(cut)))
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
        return self._ranking(roc_auc_score)

    def average_precision(self) -> float | None:
        """None when one class is absent."""
        return self._ranking(average_precision_score)

    def _ranking(self, score: Callable[..., float]) -> float | None:
        """A score of scikit-learn's, each bin counting as one tied score."""
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
    """The bin of each score, int32: the bits of a float32 grow with its magnitude."""
    bits = (score.float() + 0.0).view(torch.int32)  # -0.0 + 0.0 is 0.0
    step = (bits & 0x7FFFFFFF).bitwise_right_shift_(23 - MANTISSA)
    step.sub_((127 + LOWEST) << MANTISSA).clamp_(0, HALF - 1)
    # Below zero, step s becomes -1 - s, which is ~s: the sign bit, spread, is the mask.
    return step.bitwise_xor_(bits >> 31).add_(HALF)


def _edge(index: int) -> float:
    """The lowest score of a bin, a float32; of `BINS`, the first above the highest bin."""
    step = index - HALF if index >= HALF else HALF - index
    bits = (step + ((127 + LOWEST) << MANTISSA)) << (23 - MANTISSA)
    if index >= HALF:
        return float(np.uint32(bits).view(np.float32)) if step else 0.0
    return -float(np.uint32(bits - 1).view(np.float32))
