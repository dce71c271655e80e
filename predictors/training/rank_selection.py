"""Default formats and ranks, and ranks per layer under a budget.

PowerInfer (arXiv 2312.12456, section 5.1) gives sparser and more skewed layers smaller predictors,
but never released its rule. Here a rank is judged by the untrained reduced-rank regression of that
rank (warm_start.py), by its predicted sparsity at the target recall:

    traffic(r) = bytes(r) / FFN bytes + 1 - predicted sparsity(r)

The budget is spent where a byte lowers the sum of traffics most.

Shape letters: D hidden, F FFN width.
"""

from __future__ import annotations

import torch

from sparsecast.collect.store.store import ActivationStore
from sparsecast.core.errors import InputError
from sparsecast.core.ggml_blocks import BLOCK
from sparsecast.core.messages import log
from sparsecast.core.models.shape import ModelShape
from sparsecast.core.progress import progress_bar
from sparsecast.predictors.calibration.bias import BiasUnits, bias_of, bias_units
from sparsecast.predictors.formats import share_of_ffn
from sparsecast.predictors.layer_data import layer_batches
from sparsecast.predictors.metrics import ScoreHistogram
from sparsecast.predictors.training.warm_start import Moments, moments, reduced_rank

SHARE = {"f16": 3 / 8, "q8_0": 3 / 8, "q4_0": 5 / 8}
"""Default rank of each format, relative to the hidden size."""
PUBLIC_SHARE = 1 / 4
"""Default rank of the public recipe."""
TRIED = 6
"""Ranks scored per layer."""


def default_dtype(recipe: str, hidden_size: int) -> str:
    """The smallest format that the recipe and the hidden size allow."""
    return "f16" if recipe == "reference" or hidden_size % BLOCK else "q4_0"


def default_rank(recipe: str, dtype: str, hidden_size: int) -> int:
    """A share of the hidden size, in whole blocks."""
    share = PUBLIC_SHARE if recipe == "reference" else SHARE[dtype]
    return max(BLOCK, round(hidden_size * share / BLOCK) * BLOCK)


def check_traffic_budget(budget: float, shape: ModelShape, dtype: str, ranks: list[int]) -> None:
    """Refuse a traffic budget that predictors of these ranks alone exceed."""
    share = sum(share_of_ffn(rank, dtype, shape) for rank in ranks) / len(ranks)
    if share >= budget:
        raise InputError(
            f"--traffic-budget: got {budget}, but the predictors alone are {share:.4f} of the FFN; "
            "allow more, or choose a smaller --rank or --predictor-dtype q4_0"
        )


def ranks_within_budget(
    budget: float, recall: float, store: ActivationStore, dtype: str, device: torch.device
) -> list[int]:
    """Choose the rank of every layer, bias units included.

    Args:
        budget: Bytes of all predictors over those of the FFN in f16.
        recall: The recall at which ranks are compared.

    Raises:
        InputError: The budget does not hold the smallest predictors.
    """
    layers = store.manifest.layers
    unit = share_of_ffn(BLOCK, dtype, store.manifest.model_shape)
    if unit > budget:
        raise InputError(
            f"--predictor-budget: got {budget}, expected at least {unit:.4f}, the size of rank "
            f"{BLOCK} in {dtype}; allow more"
        )
    mean = int(budget / unit)
    largest = min(2 * mean, max(1, store.manifest.hidden_size // BLOCK))
    tried = sorted({max(1, round(largest * (i + 1) / TRIED)) for i in range(TRIED)})
    gains = []
    with progress_bar("ranks", len(layers)) as progress:
        for layer in layers:
            m = moments(store, layer, device)
            skipped = [_sparsity(recall, store, layer, m, n * BLOCK, dtype, device) for n in tried]
            gains.append(skipped)
            progress.advance()
    blocks = _spend(gains, tried, mean * len(layers), unit)
    ranks = [n * BLOCK for n in blocks]
    log.info(f"ranks {min(ranks)} to {max(ranks)}, mean {sum(ranks) / len(ranks):.0f}")
    return ranks


def _spend(gains: list[list[float]], tried: list[int], total: int, unit: float) -> list[int]:
    """Share blocks out over layers: start with the fewest, then repeatedly take the step that gains
    the most sparsity per block, possibly over several sizes, while it lowers traffic and fits.

    Args:
        gains: Predicted sparsity of each layer at each size in `tried`.
        tried: Sizes in blocks, ascending.
        total: Blocks to spend.
        unit: Traffic that one block costs.

    Returns:
        Blocks of each layer.
    """
    place = [0] * len(gains)
    left = total - tried[0] * len(gains)
    while True:
        best, step = 0.0, None
        for layer, skipped in enumerate(gains):
            at = place[layer]
            for to in range(at + 1, len(tried)):
                more = tried[to] - tried[at]
                gain = (skipped[to] - skipped[at]) / more
                if more <= left and gain > max(best, unit):
                    best, step = gain, (layer, to, more)
        if step is None:
            return [tried[at] for at in place]
        layer, to, more = step
        place[layer], left = to, left - more


def _sparsity(
    recall: float,
    store: ActivationStore,
    layer: int,
    m: Moments,
    rank: int,
    dtype: str,
    device: torch.device,
) -> float:
    """Predicted sparsity of the warm start at `recall`, on the calibration split."""
    u_D, fc1_RD, fc2_FR, offset_F = reduced_rank(m, rank - bias_units(dtype))
    uncalibrated = BiasUnits(fc1_RD, fc2_FR, offset_F, u_D, m.mean_D, "f16")
    predictor = uncalibrated.at_threshold(0.0).to(device)
    histogram = ScoreHistogram()
    for x_TD, active_TF in layer_batches(store, "calibration", layer, device=device):
        score_TF = predictor.logits(x_TD) / bias_of(predictor, uncalibrated.constant_R, x_TD)
        histogram.add(score_TF, active_TF)
    return histogram.at(histogram.threshold_for_recall(recall))[1]
