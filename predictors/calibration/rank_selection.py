"""Formats and ranks where the user names none, and ranks per layer under a budget.

PowerInfer (arXiv 2312.12456, section 5.1) gives sparser and more skewed layers smaller predictors;
its rule was never released. Here the reduced-rank regression that training starts from, which any
rank is a cut of, stands in for what a rank will give: its predicted sparsity at the objective.

    traffic(r) = bytes(r) / FFN bytes + 1 - predicted sparsity(r)

A budget is spent where a byte lowers the sum of traffics most.

Shape letters: D hidden, F FFN width.
"""

from __future__ import annotations

import torch

from sparsecast.collect.store.store import ActivationStore
from sparsecast.core.errors import InputError
from sparsecast.core.ggml_blocks import BLOCK
from sparsecast.core.messages import log
from sparsecast.core.progress import progress_bar
from sparsecast.predictors.calibration.bias import BiasUnits, bias_of, bias_units
from sparsecast.predictors.config import TrainConfig
from sparsecast.predictors.formats import BITS
from sparsecast.predictors.metrics import ScoreHistogram
from sparsecast.predictors.training.data import layer_batches
from sparsecast.predictors.training.warm_start import Moments, moments, reduced_rank

SHARE = {"f16": 3 / 8, "q8_0": 3 / 8, "q4_0": 5 / 8}
"""Of the hidden size, where no rank is given."""
TRIED = 6
"""Ranks that are scored per layer."""


def default_dtype(cfg: TrainConfig, hidden_size: int) -> str:
    """The format asked for, or the smallest that fits."""
    if cfg.predictor_dtype is not None:
        return cfg.predictor_dtype
    return "f16" if cfg.recipe == "reference" or hidden_size % BLOCK else "q4_0"


def ranks_for(
    cfg: TrainConfig, store: ActivationStore, dtype: str, device: torch.device
) -> list[int]:
    """The rank of every layer, bias units included."""
    made = store.manifest
    if cfg.predictor_budget is not None:
        return _within(cfg, store, dtype, device)
    if cfg.rank is not None and cfg.rank > (most := 2 * made.hidden_size):
        raise InputError(
            f"--rank: got {cfg.rank}, expected at most twice the hidden size, {most}: more units "
            "than that have nothing to start from"
        )
    if cfg.rank is not None:
        return [cfg.rank] * len(made.layers)
    share = 1 / 4 if cfg.recipe == "reference" else SHARE[dtype]
    rank = max(BLOCK, round(made.hidden_size * share / BLOCK) * BLOCK)
    return [rank] * len(made.layers)


def check_traffic(cfg: TrainConfig, store: ActivationStore, dtype: str, ranks: list[int]) -> None:
    """Refuse a traffic budget that predictors of these ranks alone exceed."""
    if cfg.traffic_budget is None:
        return
    share = sum(share_of_ffn(rank, store, dtype) for rank in ranks) / len(ranks)
    if share >= cfg.traffic_budget:
        raise InputError(
            f"--traffic-budget: {cfg.traffic_budget}, but the predictors alone are {share:.4f} of "
            "the FFN; allow more, or choose a smaller --rank or --predictor-dtype q4_0"
        )


def share_of_ffn(rank: int, store: ActivationStore, dtype: str) -> float:
    """Bytes of one predictor over those of its layer's FFN in f16."""
    d, f, m = store.manifest.hidden_size, store.manifest.ffn_width, store.manifest.ffn_matrices
    return rank * (d + f) * BITS[dtype] / (m * d * f * 16)


def _within(
    cfg: TrainConfig, store: ActivationStore, dtype: str, device: torch.device
) -> list[int]:
    budget = cfg.predictor_budget
    assert budget is not None
    layers = store.manifest.layers
    unit = share_of_ffn(BLOCK, store, dtype)
    if unit > budget:
        raise InputError(
            f"--predictor-budget: {budget} is less than the smallest predictors take, rank {BLOCK} "
            f"in {dtype} is {unit:.4f} of the FFN; allow at least that"
        )
    mean = int(budget / unit)
    largest = min(2 * mean, max(1, store.manifest.hidden_size // BLOCK))
    tried = sorted({max(1, round(largest * (i + 1) / TRIED)) for i in range(TRIED)})
    gains = []
    with progress_bar("ranks", len(layers)) as progress:
        for layer in layers:
            m = moments(store, layer, device)
            skipped = [_sparsity(cfg, store, layer, m, n * BLOCK, dtype, device) for n in tried]
            gains.append(skipped)
            progress.advance()
    blocks = _spend(gains, tried, mean * len(layers), unit)
    ranks = [n * BLOCK for n in blocks]
    log.info(f"ranks {min(ranks)} to {max(ranks)}, mean {sum(ranks) / len(ranks):.0f}")
    return ranks


def _spend(gains: list[list[float]], tried: list[int], total: int, unit: float) -> list[int]:
    """Blocks of every layer: begin with the fewest, then take the step with the most to gain per
    byte, jumps over several sizes included, while it lowers traffic and fits."""
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
    cfg: TrainConfig,
    store: ActivationStore,
    layer: int,
    m: Moments,
    rank: int,
    dtype: str,
    device: torch.device,
) -> float:
    """Predicted sparsity of the untrained start at the objective's recall, on calibration."""
    u_D, fc1_RD, fc2_FR, offset_F = reduced_rank(m, rank - bias_units(dtype))
    uncut = BiasUnits(fc1_RD, fc2_FR, offset_F, u_D, "f16")
    predictor = uncut.cut(0.0).to(device)
    histogram = ScoreHistogram()
    for x_TD, active_TF in layer_batches(store, "calibration", layer, device=device):
        score_TF = predictor.logits(x_TD) / bias_of(predictor, uncut.constant_R, x_TD)
        histogram.add(score_TF, active_TF)
    return histogram.at(histogram.cut_for_recall(cfg.recall))[1]
