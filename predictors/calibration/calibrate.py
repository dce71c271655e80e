"""Choose each layer's operating point on the calibration split, with the weights as exported.

Shape letters: T tokens, D hidden, F FFN width, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sparsecast.collect.store.store import ActivationStore
from sparsecast.core.errors import InputError
from sparsecast.predictors.calibration.bias import UncalibratedPredictor, bias_of
from sparsecast.predictors.metrics import Counts, ScoreHistogram, count
from sparsecast.predictors.predictor import Predictor, rms
from sparsecast.predictors.training.data import layer_batches

SPLIT = "calibration"
CLOSE = 2e-4
"""A cut this near to the objective, in predicted sparsity, is not moved again."""
NEAR = 1e-2
ROUNDS = 8
RIDGE = 1e-4
"""Relative to the mean square of a hidden unit."""

Cut = Callable[[ScoreHistogram], float]
"""From the scores p / b of one layer to where to cut them."""


class Calibrated(NamedTuple):
    """A predictor to export, for threshold 0, and its counts on the calibration split."""

    predictor: Predictor
    counts: Counts
    cut: float


def recall_cut(recall: float) -> Cut:
    return lambda histogram: histogram.cut_for_recall(recall)


def sparsity_cut(sparsity: float) -> Cut:
    return lambda histogram: histogram.cut_for_sparsity(sparsity)


def calibrate(
    uncut: UncalibratedPredictor,
    store: ActivationStore,
    layer: int,
    cut: Cut,
    device: torch.device | str = "cpu",
) -> Calibrated:
    """Cut one layer's predictor at the objective and round it to its format.

    A moved cut is rounded anew, which moves decisions a little, so the scores are taken again until
    the cut stays where it is; once it is near only second digits move (bias.py). The cut that came
    closest counts.
    """
    at = near = 0.0
    best, distance, off = None, float("inf"), float("inf")
    for turn in range(ROUNDS):
        near = at if turn < 2 or off > NEAR else near
        predictor = uncut.cut(at, near)
        if not all(bool(weight.isfinite().all()) for weight in predictor.weights):
            raise InputError(
                f"layer {layer}: its predictor has weights that {uncut.dtype} cannot hold; train "
                "with a smaller --lr, or choose another --rank"
            )
        on_device = predictor.to(torch.device(device))
        histogram, total = scores(on_device, uncut.constant_R, store, layer)
        step = cut(histogram)
        # What the objective wants beside what the file gives, as shares of all entries.
        wanted = histogram.at(step)[1]
        if (off := abs(total.predicted_sparsity - wanted)) < distance:
            best, distance = Calibrated(predictor, total, at), off
        if off < CLOSE:
            break
        at += step
    assert best is not None
    return best


def scores(
    predictor: Predictor, constant_R: Tensor, store: ActivationStore, layer: int
) -> tuple[ScoreHistogram, Counts]:
    """Of a predictor on the calibration split: p / b, and counts at threshold 0."""
    histogram, total = ScoreHistogram(), Counts(0, 0, 0, 0)
    device = predictor.fc1_RD.device
    for x_TD, active_TF in layer_batches(store, SPLIT, layer, device=device):
        logits_TF = predictor.logits(x_TD)
        histogram.add(logits_TF / bias_of(predictor, constant_R, x_TD), active_TF)
        total = total.plus(count(logits_TF >= 0, active_TF))
    return histogram, total


def constant_of(predictor: Predictor, store: ActivationStore, layer: int) -> Tensor:
    """(R,) float32: the combination of hidden units that is nearest to rms(x), by least squares on
    the calibration split."""
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


def at_zero(
    predictor: Predictor, store: ActivationStore, layer: int, device: torch.device
) -> Calibrated:
    """A predictor that is not cut: its counts at threshold 0."""
    total, on_device = Counts(0, 0, 0, 0), predictor.to(device)
    for x_TD, active_TF in layer_batches(store, SPLIT, layer, device=device):
        total = total.plus(count(on_device.logits(x_TD) >= 0, active_TF))
    return Calibrated(predictor, total, 0.0)
