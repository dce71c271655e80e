"""Calibrate all layers to an objective.

A recall or sparsity target is the same for every layer. A traffic budget is spent where loaded
neurons find the most active ones: at a price t per loaded share, each layer takes the point of its
curve with the largest recall - t load, and t is chosen so that the mean load fits the budget. A
perplexity target takes the smallest recall, common to all layers, that meets it on the calibration
documents with the predictors in the loop; the share of misses is bisected on a logarithmic scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import cast

import numpy as np
import torch
from transformers import PreTrainedModel

from sparsecast.collect.store.store import ActivationStore
from sparsecast.core.errors import InputError
from sparsecast.core.messages import log
from sparsecast.core.models.perplexity import dense_perplexity, perplexity
from sparsecast.core.progress import progress_bar
from sparsecast.core.text.tokens import Sequence, TokenBatch, batch_by_length
from sparsecast.predictors.calibration.bias import UncalibratedPredictor
from sparsecast.predictors.calibration.calibrate import (
    SPLIT,
    Calibrated,
    Threshold,
    calibrate_layer,
    for_recall,
    for_sparsity,
    score_calibration,
    without_calibration,
)
from sparsecast.predictors.calibration.objective import Objective
from sparsecast.predictors.checkpoint import PredictorSet
from sparsecast.predictors.formats import share_of_ffn
from sparsecast.predictors.model_in_loop import predictors_in_loop
from sparsecast.predictors.predictor import Predictor
from sparsecast.predictors.recorded_model import load_recorded

MOST_MISSES, FEWEST_MISSES = 0.3, 1e-4
"""Bounds of 1 - recall."""
RATIO = 1.1
"""Bisection ends when the bounds of the misses are within this ratio."""
BATCH = 8
"""Documents per forward pass."""


class PerplexityNotMet(InputError):
    """No operating point keeps the change of perplexity within its target."""

    def __init__(self, text: str, closest: float) -> None:
        super().__init__(text)
        self.closest = closest
        """The change at the fewest misses."""


def calibrate_layers(
    objective: Objective,
    predictors: list[UncalibratedPredictor | Predictor],
    store: ActivationStore,
    device: torch.device,
    model: str | None,
) -> list[Calibrated]:
    """Choose the operating point of every layer.

    Args:
        predictors: Uncalibrated, but for those of experts with too few rows, which stay as they
            are; a perplexity or traffic objective takes no such.
        model: The recorded model, for a perplexity objective.

    Memory: the predictors once more, as exported; for a perplexity objective also the model.

    Raises:
        InputError: The objective cannot be met; says how close it came, and what would meet it.
    """
    free = cast(list[UncalibratedPredictor], predictors)
    if objective.perplexity is not None:
        assert model is not None
        loaded = load_recorded(model, store, device)
        return _meet_perplexity(objective.perplexity, free, store, device, loaded)
    if objective.traffic is not None:
        thresholds = _meet_traffic(objective.traffic, free, store, device)
    elif objective.sparsity is not None:
        thresholds = [for_sparsity(objective.sparsity)] * len(predictors)
    else:
        thresholds = [for_recall(objective.recall)] * len(predictors)
    return _calibrate_each(predictors, thresholds, store, device)


def _calibrate_each(
    predictors: Collection[UncalibratedPredictor | Predictor],
    thresholds: list[Threshold],
    store: ActivationStore,
    device: torch.device,
) -> list[Calibrated]:
    done = []
    with progress_bar("calibrate", len(predictors)) as progress:
        for layer, (predictor, threshold) in enumerate(zip(predictors, thresholds, strict=True)):
            if isinstance(predictor, Predictor):
                done.append(without_calibration(predictor, store, layer, device))
            else:
                done.append(calibrate_layer(predictor, store, layer, threshold, device))
            progress.advance()
    return done


def _meet_traffic(
    budget: float,
    predictors: list[UncalibratedPredictor],
    store: ActivationStore,
    device: torch.device,
) -> list[Threshold]:
    sizes, curves = [], []
    for layer, uncalibrated in enumerate(predictors):
        predictor = uncalibrated.at_threshold(0.0)
        sizes.append(share_of_ffn(predictor.rank, predictor.dtype, store.manifest.model_shape))
        histogram, _ = score_calibration(
            predictor.to(device), uncalibrated.constant_R, store, layer
        )
        curves.append(np.array(histogram.curve(2000)))
    load = budget - sum(sizes) / len(sizes)
    low, high = 0.0, 1e3
    for _ in range(60):
        price = (low + high) / 2
        if _mean_load(curves, price) > load:
            low = price
        else:
            high = price
    return [for_sparsity(_sparsity_at(curve, high)) for curve in curves]


def _sparsity_at(curve: np.ndarray, price: float) -> float:
    """Predicted sparsity of the best point at a price; `curve` holds (recall, sparsity) pairs."""
    best = curve[np.argmax(curve[:, 0] - price * (1 - curve[:, 1]))]
    return float(min(max(best[1], 1e-6), 1 - 1e-6))


def _mean_load(curves: list[np.ndarray], price: float) -> float:
    return float(np.mean([1 - _sparsity_at(curve, price) for curve in curves]))


def _meet_perplexity(
    target: float,
    predictors: list[UncalibratedPredictor],
    store: ActivationStore,
    device: torch.device,
    model: PreTrainedModel,
) -> list[Calibrated]:
    data = recorded_documents(store)
    dense = dense_perplexity(model, data)
    kept: list[list[Calibrated]] = []

    def change(misses: float) -> float:
        thresholds = [for_recall(1 - misses)] * len(predictors)
        done = _calibrate_each(predictors, thresholds, store, device)
        value = perplexity_with(model, done, data) / dense - 1
        log.info(f"recall {1 - misses:.4f}: perplexity {value:+.3%}")
        if value <= target:
            kept[:] = [done]
        return value

    if (closest := most_misses(change, target)) is not None:
        raise PerplexityNotMet(
            f"--target-perplexity: at a recall of {1 - FEWEST_MISSES} the change is still "
            f"{closest:.4%}, above {target:.4%}; train with a larger --rank, more --epochs or more "
            "tokens",
            closest,
        )
    return kept[0]


def most_misses(
    change: Callable[[float], float], target: float, fewest: float | None = None
) -> float | None:
    """Search the largest share of misses whose change is at most `target`, within `RATIO`.

    Args:
        change: Measures the change of perplexity at a share of misses, and keeps the last result
            that meets the target.
        fewest: The smallest share that is tried; unset: `FEWEST_MISSES`.

    Returns:
        None if a share was found, else the change at the fewest misses.
    """
    few, many = FEWEST_MISSES if fewest is None else fewest, MOST_MISSES
    if change(many) <= target:
        return None
    if not (closest := change(few)) <= target:
        return closest
    while many / few > RATIO:
        middle = math.sqrt(few * many)
        if change(middle) <= target:
            few = middle
        else:
            many = middle
    return None


def perplexity_with(
    model: PreTrainedModel, layers: list[Calibrated], data: list[TokenBatch]
) -> float:
    """Perplexity with the predictors' masks and the model's own activation."""
    predictors = PredictorSet([layer.predictor for layer in layers], 0.0, None)
    with predictors_in_loop(model, predictors):
        return perplexity(model, data)


def recorded_documents(store: ActivationStore, split: str = SPLIT) -> list[TokenBatch]:
    """Rebuild the recorded documents of a split from the store's token ids."""
    rows, longest = [], 2
    for shard in range(len(store.shards(split))):
        ids, position = store.tokens(split, shard)
        starts = (position == 0).nonzero().flatten().tolist()
        for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
            rows.append(Sequence(split, ids[start:stop].tolist(), False))
            longest = max(longest, stop - start)
    return list(batch_by_length(rows, seq_len=longest, batch_size=BATCH))
