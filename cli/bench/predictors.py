"""`sparsecast bench predictors`: our predictors against the public recipe's, on the same tokens.

    same rank     both in f16; ours misses (1 - recall) on held-out tokens when each layer skips
                  exactly as much as the public recipe's skips there
    same bytes    the same for our q4_0 predictors of at most as many bytes
    perplexity    the least traffic within a change of perplexity: ours by its objective, the public
                  recipe's by its one threshold; both are chosen on calibration documents and scored
                  on held-out ones

Tables and JSON call the public recipe's predictors the reference. All predictors are trained into
`--out` and kept there, so a second run only measures.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from sparsecast.cli.bench.predictors_scores import (
    HELD_OUT,
    at_perplexity,
    count_layers,
    mean_scores,
    misses,
)
from sparsecast.cli.bench.results import check_json, new_table, publish
from sparsecast.collect.store.store import ActivationStore
from sparsecast.core.ggml_blocks import BLOCK
from sparsecast.core.messages import log, show
from sparsecast.core.options import check_between, validate_fields
from sparsecast.predictors.config import TrainConfig
from sparsecast.predictors.formats import BITS, check_widths
from sparsecast.predictors.train import train


@dataclass(frozen=True, kw_only=True)
class BenchPredictorsConfig:
    """Compare predictors of the public recipe with ours, trained on the same activations.

    Trained predictors are kept in --out; the same command measures again without training.
    """

    activations: Path
    """Folder written by `sparsecast collect`."""

    model: str
    """The model that was recorded."""

    out: Path
    """Folder for the predictors that are compared."""

    perplexity: float = 0.005
    """Relative change of perplexity allowed to both."""

    epochs: int | None = None
    """Passes over the training tokens for ours; unset: --reference-epochs at the reference's rank
    and format, elsewhere the default of `sparsecast train`."""

    reference_epochs: int = 20
    """Most passes over the training tokens for the public recipe."""

    device: str = "auto"
    """auto, cpu or cuda."""

    json: Path | None = None
    """Write the numbers to this file."""

    def __post_init__(self) -> None:
        validate_fields(self, epochs=1, reference_epochs=1)
        check_between(self, 0, 1, "perplexity")


def bench_predictors(cfg: BenchPredictorsConfig) -> dict[str, Any]:
    """Train what is missing in `cfg.out`, then measure.

    Memory: as for `train`, then the model and one set of predictors.
    """
    check_json(cfg.json)
    store = ActivationStore(cfg.activations)
    check_widths("q4_0", rank=BLOCK, hidden_size=store.manifest.hidden_size)
    base = TrainConfig(
        activations=cfg.activations, out=cfg.out / "reference", model=cfg.model, device=cfg.device
    )
    reference = train(replace(base, recipe="reference", epochs=cfg.reference_epochs))
    rank = reference.layers[0].rank
    ours = replace(base, epochs=cfg.epochs)
    epochs = cfg.epochs or cfg.reference_epochs
    alike = replace(ours, epochs=epochs, predictor_dtype="f16", rank=rank)
    same_rank = train(replace(alike, out=cfg.out / "f16"))
    fits = int(rank * BITS["f16"] / BITS["q4_0"]) // BLOCK * BLOCK
    same_bytes = train(replace(ours, out=cfg.out / "q4_0", predictor_dtype="q4_0", rank=fits))
    at_change = train(replace(ours, out=cfg.out / "perplexity", target_perplexity=cfg.perplexity))
    counts = count_layers(reference, store)
    values = {
        "model": store.manifest.model,
        "held_out_tokens": store.manifest.tokens(HELD_OUT),
        "reference": {"rank": rank, "bytes": reference.nbytes, **mean_scores(counts)},
        "same_rank": misses(same_rank, counts, store),
        "same_bytes": misses(same_bytes, counts, store),
        "perplexity": at_perplexity(
            cfg.model, cfg.device, cfg.perplexity, store, reference, at_change
        ),
    }
    return publish(values, cfg.json, _show)


def _show(values: dict[str, Any]) -> None:
    show(_misses_table(values))
    found = values["perplexity"]
    show(_perplexity_table(found))
    log.info(
        f"traffic {found['traffic_ratio']:.3f} times the reference's, cascade "
        f"{found['cascade_ratio']:.3f} times; {found['over_oracle']:.2f} times the oracle"
    )


def _misses_table(values: dict[str, Any]) -> Table:
    reference = values["reference"]
    table = new_table(
        "", "rank", "format", "bytes", "recall", "misses against reference",
        title=f"misses at the reference's predicted sparsity ({reference['predicted_sparsity']:.4f}"
        f" on {values['held_out_tokens']:,} held-out tokens)",
    )  # fmt: skip
    table.add_row(
        "reference",
        str(reference["rank"]),
        "f16",
        f"{reference['bytes']:,}",
        f"{reference['recall']:.4f}",
        "1",
    )
    for name in ("same_rank", "same_bytes"):
        row = values[name]
        table.add_row(
            name.replace("_", " "),
            str(row["rank"]),
            row["dtype"],
            f"{row['bytes']:,}",
            f"{row['recall']:.4f}",
            "-" if row["miss_ratio"] is None else f"{row['miss_ratio']:.3f}",
        )
    return table


def _perplexity_table(found: dict[str, Any]) -> Table:
    table = new_table(
        "", "rank", "format", "held-out change", "recall", "predicted sparsity",
        "traffic", "cascade", "exact", "oracle",
        title=f"at most {found['limit']:+.2%} perplexity",
    )  # fmt: skip
    scores = ("recall", "predicted_sparsity", "traffic", "cascade", "exact", "oracle")
    for name in ("reference", "ours"):
        row = found[name]
        table.add_row(
            name,
            f"{row['rank']:g}",
            row["dtype"],
            f"{row['held_out_change']:+.3%}",
            *(f"{row[key]:.4f}" for key in scores),
        )
    return table
