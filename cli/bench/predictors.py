"""`sparsecast bench predictors`: our predictors against others, on the same tokens.

    same rank     the public recipe's and ours, both in f16; ours misses (1 - recall) on held-out
                  tokens when each layer skips exactly as much as the public recipe's skips there
    same bytes    the same for our q4_0 predictors of at most as many bytes
    perplexity    the least traffic within a change of perplexity: ours and an SVD of the gates by
                  `train`'s objective, the public recipe's by its one threshold, SparseInfer's signs
                  by one threshold a layer; all are chosen on calibration documents and scored on
                  held-out ones, here and where asked in another text

Tables and JSON call the public recipe's predictors the reference. All predictors are trained into
`--out` and kept there, so a second run only measures.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsecast.cli.bench.predictors_config import BenchPredictorsConfig
from sparsecast.cli.bench.predictors_points import (
    NotMet,
    Point,
    Search,
    common_thresholds,
    point_of,
    sign_thresholds,
)
from sparsecast.cli.bench.predictors_scores import (
    HELD_OUT,
    OURS,
    HeldOut,
    compared,
    count_layers,
    mean_scores,
    misses,
)
from sparsecast.cli.bench.predictors_seeds import over_seeds
from sparsecast.cli.bench.predictors_table import show_predictors
from sparsecast.cli.bench.predictors_training import Clock, Trained, train_seed, train_svd
from sparsecast.cli.bench.results import check_json, publish
from sparsecast.collect.store.store import ActivationStore
from sparsecast.core.errors import InputError
from sparsecast.core.ggml_blocks import BLOCK
from sparsecast.core.models.loading import pick_device
from sparsecast.predictors.checkpoint import PredictorSet
from sparsecast.predictors.formats import check_widths
from sparsecast.predictors.recorded_model import load_recorded

Points = dict[str, Point | NotMet]
"""What one seed puts into the table of perplexity, by row."""


def bench_predictors(cfg: BenchPredictorsConfig) -> dict[str, Any]:
    """Train what is missing in `cfg.out`, then measure.

    Memory: as for `train`, then the model, one set of predictors, and the signs of all gates with 4
    bytes each.

    Raises:
        InputError: What `train` refuses, but for a limit on perplexity that cannot be met; another
            model's `cfg.other_activations`.
    """
    check_json(cfg.json)
    store = ActivationStore(cfg.activations)
    check_widths("q4_0", rank=BLOCK, hidden_size=store.manifest.hidden_size)
    other = None
    if cfg.other_activations is not None:
        other = open_other(cfg.other_activations, store)
    clock = Clock()
    trained = [train_seed(cfg, seed, clock) for seed in range(cfg.seeds)]
    svd = train_svd(cfg, clock)
    with clock.phase("misses"):
        runs = [_misses(cfg, store, one) for one in trained]
    for run, tables in zip(runs, _tables(cfg, store, other, trained, svd, clock), strict=True):
        run |= tables
    values = {
        "model": store.manifest.model,
        "held_out_tokens": store.manifest.tokens(HELD_OUT),
        "seeds": cfg.seeds,
        **over_seeds(runs),
        "seconds": {**clock.seconds, "total": sum(clock.seconds.values())},
    }
    return publish(values, cfg.json, show_predictors)


def open_other(folder: Path, store: ActivationStore) -> ActivationStore:
    """Open activations of another text, and refuse those that the same rules cannot be scored on.

    Raises:
        InputError: Those of another model, activation or layers; see `ActivationStore`.
    """
    other, option = ActivationStore(folder), f"--other-activations {folder}"
    ours, theirs = store.manifest, other.manifest
    if theirs.fingerprint != ours.fingerprint:
        raise InputError(
            f"{option}: recorded from {theirs.model}, which is not the model of {store.folder}; "
            f"record the other text with {ours.model}"
        )
    for name, mine, found in (
        ("activation", ours.activation, theirs.activation),
        ("activation threshold", ours.activation_threshold, theirs.activation_threshold),
        ("layers", ours.layers, theirs.layers),
    ):
        if mine != found:
            raise InputError(
                f"{option}: recorded with the {name} {found}, but {store.folder} with {mine}; "
                "record the other text as that one was"
            )
    return other


def _misses(cfg: BenchPredictorsConfig, store: ActivationStore, trained: Trained) -> dict[str, Any]:
    """What ours misses where they skip as much as the reference does."""
    reference, device = trained.reference, pick_device(cfg.device)
    counts = count_layers(reference.layers, reference.threshold, store, device)
    own = {"rank": reference.layers[0].rank, "bytes": reference.nbytes}
    return {
        "reference": own | mean_scores(counts),
        "same_rank": misses(trained.same_rank, counts, store, device),
        "same_bytes": misses(trained.same_bytes, counts, store, device),
    }


def _tables(
    cfg: BenchPredictorsConfig,
    store: ActivationStore,
    other: ActivationStore | None,
    trained: Sequence[Trained],
    svd: PredictorSet | NotMet,
    clock: Clock,
) -> list[dict[str, Any]]:
    """The tables of perplexity of every seed, here and on the other text."""
    device = pick_device(cfg.device)
    with clock.phase("thresholds"):
        model = load_recorded(cfg.model, store, device)
        search = Search(model, store, cfg.perplexity)
        shared: Points = {
            "svd": _point(svd, store),
            "sign": search.most_misses(sign_thresholds(model, store, device)),
        }
        own: list[Points] = [
            {
                "reference": search.most_misses(common_thresholds(one.reference, store, device)),
                OURS: _point(one.ours, store),
            }
            for one in trained
        ]
    tables: list[dict[str, Any]] = [{} for _ in trained]
    for name, where in (("perplexity", store), ("other", other)):
        if where is None:
            continue
        with clock.phase("held_out" if where is store else "other"):
            held_out = HeldOut(model, where)
            alike = {row: held_out.score(point) for row, point in shared.items()}
            for table, points in zip(tables, own, strict=True):
                rows = {row: held_out.score(point) for row, point in points.items()}
                ordered = {"reference": rows["reference"], **alike, OURS: rows[OURS]}
                table[name] = compared(cfg.perplexity, ordered)
                if where is other:
                    table[name] |= _place(where)
    return tables


def _point(predictors: PredictorSet | NotMet, store: ActivationStore) -> Point | NotMet:
    return point_of(predictors, store) if isinstance(predictors, PredictorSet) else predictors


def _place(store: ActivationStore) -> dict[str, Any]:
    """What the JSON says of the other text."""
    return {
        "activations": str(store.folder),
        "corpus": store.manifest.corpus,
        "held_out_tokens": store.manifest.tokens(HELD_OUT),
    }
