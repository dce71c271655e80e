"""Calibrate one layer: choose its threshold on the calibration split, with the weights as stored.

Shape letters: T tokens, D hidden, F FFN width, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sparsecast.collect.store.store import ActivationStore
from sparsecast.core.errors import InputError
from sparsecast.core.models.ffns import ffn_name
from sparsecast.predictors.calibration.bias import UncalibratedPredictor, bias_of
from sparsecast.predictors.layer_data import layer_batches
from sparsecast.predictors.metrics import Counts, ScoreHistogram, count
from sparsecast.predictors.predictor import Predictor, rms

SPLIT = "calibration"
CLOSE = 2e-4
"""A threshold this near to the objective, in predicted sparsity, is final."""
NEAR = 1e-2
"""A threshold this near to the objective moves by second digits only."""
ROUNDS = 8
"""Most corrections of a threshold."""
RIDGE = 1e-4
"""Ridge of the least squares, relative to the mean square of a hidden unit."""

Threshold = Callable[[ScoreHistogram], float]
"""Maps the scores p / b of one layer to a threshold for them."""


class Calibrated(NamedTuple):
    """A predictor to export, for threshold 0, and its counts on the calibration split."""

    predictor: Predictor
    counts: Counts


def for_recall(recall: float) -> Threshold:
    """The largest threshold that reaches a recall."""
    return lambda histogram: histogram.threshold_for_recall(recall)


def for_sparsity(sparsity: float) -> Threshold:
    """The smallest threshold that reaches a predicted sparsity."""
    return lambda histogram: histogram.threshold_for_sparsity(sparsity)


def calibrate_layer(
    uncalibrated: UncalibratedPredictor,
    store: ActivationStore,
    layer: int,
    threshold_for: Threshold,
    device: torch.device | str = "cpu",
) -> Calibrated:
    """Fold the threshold that meets the objective into one layer's predictor, as stored.

    Folding a threshold rounds the weights again, which changes a few decisions, so the threshold is
    corrected until it stays put, and the closest one is kept. Near the objective only second digits
    move (bias.py).
    """
    uncalibrated = uncalibrated.to(torch.device(device))
    threshold = coarse = 0.0
    best, distance, off = None, float("inf"), float("inf")
    for turn in range(ROUNDS):
        coarse = threshold if turn < 2 or off > NEAR else coarse
        predictor = uncalibrated.at_threshold(threshold, coarse)
        if not all(bool(weight.isfinite().all()) for weight in predictor.weights):
            raise InputError(
                f"{ffn_name(layer, store.manifest.experts)}: its predictor has weights that "
                f"{uncalibrated.dtype} cannot hold; train with a smaller --lr, or choose another "
                "--rank"
            )
        histogram, total = score_calibration(predictor, uncalibrated.constant_R, store, layer)
        step = threshold_for(histogram)
        wanted = histogram.at(step)[1]
        if (off := abs(total.predicted_sparsity - wanted)) < distance:
            best, distance = Calibrated(predictor, total), off
        if off < CLOSE:
            break
        threshold += step
    assert best is not None
    return best._replace(predictor=best.predictor.to(torch.device("cpu")))


def score_calibration(
    predictor: Predictor, constant_R: Tensor, store: ActivationStore, layer: int
) -> tuple[ScoreHistogram, Counts]:
    """Score a predictor on the calibration split: the scores p / b, and counts at threshold 0."""
    histogram, total = ScoreHistogram(), Counts(0, 0, 0, 0)
    device = predictor.fc1_RD.device
    for x_TD, active_TF in layer_batches(store, SPLIT, layer, device=device):
        logits_TF = predictor.logits(x_TD)
        histogram.add(logits_TF / bias_of(predictor, constant_R, x_TD), active_TF)
        total = total.plus(count(logits_TF >= 0, active_TF))
    return histogram, total


def constant_combination(predictor: Predictor, store: ActivationStore, layer: int) -> Tensor:
    """Fit the combination of hidden units nearest to rms(x), by least squares on the calibration
    split: (R,) float32."""
    device = predictor.fc1_RD.device
    second_RR = torch.zeros(predictor.rank, predictor.rank, device=device)
    mean_R = torch.zeros(predictor.rank, device=device)
    for x_TD, _ in layer_batches(store, SPLIT, layer, device=device):
        hidden_TR = predictor.hidden(x_TD) / rms(x_TD)
        second_RR += hidden_TR.T @ hidden_TR
        mean_R += hidden_TR.sum(0)
    ridge = (RIDGE * second_RR.diagonal().mean()).clamp_min(1e-12)
    second_RR += ridge * torch.eye(len(mean_R), device=device)
    constant_R: Tensor = torch.linalg.solve(second_RR, mean_R)
    return constant_R


def without_calibration(
    predictor: Predictor, store: ActivationStore, layer: int, device: torch.device
) -> Calibrated:
    """Leave a predictor as it is and count its decisions at threshold 0."""
    total, on_device = Counts(0, 0, 0, 0), predictor.to(device)
    for x_TD, active_TF in layer_batches(store, SPLIT, layer, device=device):
        total = total.plus(count(on_device.logits(x_TD) >= 0, active_TF))
    return Calibrated(predictor, total)
