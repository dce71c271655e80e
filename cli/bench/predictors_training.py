"""The predictors that `sparsecast bench predictors` compares, trained into one folder."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

from sparsecast.cli.bench.predictors_config import BenchPredictorsConfig
from sparsecast.cli.bench.predictors_points import NotMet
from sparsecast.core.ggml_blocks import BLOCK
from sparsecast.core.messages import log
from sparsecast.predictors.calibration.operating_point import PerplexityNotMet
from sparsecast.predictors.checkpoint import PredictorSet
from sparsecast.predictors.config import TrainConfig
from sparsecast.predictors.formats import BITS
from sparsecast.predictors.train import train


class Clock:
    """Seconds of each phase, summed over seeds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str, seed: int | None = None) -> Iterator[None]:
        """Time the block, and log a line when it ends."""
        start = perf_counter()
        yield
        took = perf_counter() - start
        self.seconds[name] = self.seconds.get(name, 0.0) + took
        of_seed = f", seed {seed}" if seed else ""
        log.info(f"{name.replace('_', ' ')}{of_seed}: {took:.1f} s")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """All predictors of one seed."""

    reference: PredictorSet
    same_rank: PredictorSet
    same_bytes: PredictorSet
    ours: PredictorSet | NotMet
    """Trained for the limit on perplexity."""


def train_seed(cfg: BenchPredictorsConfig, seed: int, clock: Clock) -> Trained:
    """Train what is missing in `cfg.out`; the folders of later seeds have their number.

    Where misses are compared, all of them weigh the same.
    """

    def out(name: str, **options: Any) -> TrainConfig:
        folder = cfg.out / (f"{name}-seed{seed}" if seed else name)
        return replace(base_config(cfg), out=folder, seed=seed, epochs=cfg.epochs, **options)

    theirs = out("reference", recipe="reference")
    with clock.phase("reference", seed):
        reference = _train(replace(theirs, epochs=cfg.reference_epochs))
    rank, epochs = reference.layers[0].rank, cfg.epochs or cfg.reference_epochs
    with clock.phase("same_rank", seed):
        alike = out("f16", predictor_dtype="f16", rank=rank, loss="count")
        same_rank = _train(replace(alike, epochs=epochs))
    fits = int(rank * BITS["f16"] / BITS["q4_0"]) // BLOCK * BLOCK
    with clock.phase("same_bytes", seed):
        same_bytes = _train(out("q4_0", predictor_dtype="q4_0", rank=fits, loss="count"))
    with clock.phase("ours", seed):
        ours = _train_to_limit(out("perplexity", target_perplexity=cfg.perplexity))
    return Trained(reference=reference, same_rank=same_rank, same_bytes=same_bytes, ours=ours)


def train_svd(cfg: BenchPredictorsConfig, clock: Clock) -> PredictorSet | NotMet:
    """Compress the gates at our default rank and format, for the limit on perplexity."""
    with clock.phase("svd"):
        base = replace(base_config(cfg), out=cfg.out / "svd", recipe="svd")
        return _train_to_limit(replace(base, target_perplexity=cfg.perplexity))


def base_config(cfg: BenchPredictorsConfig) -> TrainConfig:
    """What all trainings share."""
    return TrainConfig(activations=cfg.activations, out=cfg.out, model=cfg.model, device=cfg.device)


def _train_to_limit(cfg: TrainConfig) -> PredictorSet | NotMet:
    try:
        return _train(cfg)
    except PerplexityNotMet as error:
        log.info(f"{cfg.out}: not met, {error.closest:+.3%} at best")
        return error.closest


def _train(cfg: TrainConfig) -> PredictorSet:
    gc.collect()  # trainer and module refer to each other, and hold the memory of the next
    return train(cfg)
