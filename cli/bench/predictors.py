"""`sparsecast bench predictors`: our predictors against the public recipe's, on the same tokens.

    same rank     in f16: misses (1 - recall) on held-out tokens where each layer skips exactly what
                  the reference skips there
    same bytes    the same with q4_0 predictors of at most the reference's bytes
    perplexity    the least traffic that keeps a change of perplexity: ours by its objective, the
                  reference with its one threshold swept; both chosen on calibration documents, and
                  scored on held-out ones

Everything is trained into `--out` and kept, so that a second run measures alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from sparsecast.collect.store.store import ActivationStore
from sparsecast.core.errors import InputError
from sparsecast.core.files import check_writable_file, write_json
from sparsecast.core.ggml_blocks import BLOCK
from sparsecast.core.messages import log, show
from sparsecast.core.models.loading import pick_device
from sparsecast.core.models.perplexity import perplexity
from sparsecast.core.options import check_between, validate_fields
from sparsecast.predictors.calibration.bias import bias_of
from sparsecast.predictors.calibration.calibrate import constant_combination
from sparsecast.predictors.calibration.operating_point import recorded_documents
from sparsecast.predictors.checkpoint import PredictorSet
from sparsecast.predictors.config import TrainConfig
from sparsecast.predictors.formats import BITS, check_widths
from sparsecast.predictors.layer_data import layer_batches
from sparsecast.predictors.metrics import Counts, ScoreHistogram, count, traffic
from sparsecast.predictors.model_in_loop import predictors_in_loop
from sparsecast.predictors.recorded_model import load_recorded
from sparsecast.predictors.train import train

HELD_OUT = "held-out"
LOWEST, HIGHEST = -64.0, 16.0
"""Thresholds of the reference that are tried."""
SWEEP = 14
"""Bisections of that range."""


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Train the public recipe and ours on the same activations, and say by how much ours is better.

    What is trained is kept in --out; the same command measures again without training.
    """

    activations: Path
    """Folder written by `sparsecast collect`."""

    model: str
    """The model that was recorded."""

    out: Path
    """Folder for the predictors that are compared."""

    perplexity: float = 0.005
    """Relative change of perplexity that both may cost."""

    epochs: int | None = None
    """Passes over the training tokens of ours; unset: as many as the reference may take at its own
    rank and format, else what `sparsecast train` takes."""

    reference_epochs: int = 20
    """At most so many of the reference's."""

    device: str = "auto"
    """auto, cpu or cuda."""

    json: Path | None = None
    """Write the numbers to this file."""

    def __post_init__(self) -> None:
        validate_fields(self, epochs=1, reference_epochs=1)
        check_between(self, 0, 1, "perplexity")


def compare(cfg: CompareConfig) -> dict[str, Any]:
    """Train what is missing in `cfg.out`, measure, show, and write `cfg.json`.

    Memory: as `train`, then the model and one set of predictors.
    """
    if cfg.json is not None:
        check_writable_file(cfg.json, "--json")
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
    held = [_reference_counts(reference, store, layer) for layer in store.manifest.layers]
    result = {
        "model": store.manifest.model,
        "held_out_tokens": store.manifest.tokens(HELD_OUT),
        "reference": {"rank": rank, "bytes": reference.nbytes, **_means(held)},
        "same_rank": _misses(same_rank, held, store),
        "same_bytes": _misses(same_bytes, held, store),
        "perplexity": _perplexity(cfg, store, reference, at_change),
    }
    _show(result)
    if cfg.json is not None:
        write_json(cfg.json, result)
    return result


def _means(counts: list[Counts]) -> dict[str, float]:
    names = ("recall", "predicted_sparsity", "true_sparsity", "precision")
    return {name: sum(getattr(c, name) for c in counts) / len(counts) for name in names}


def _reference_counts(
    predictors: PredictorSet, store: ActivationStore, layer: int, split: str = HELD_OUT
) -> Counts:
    total = Counts(0, 0, 0, 0)
    for x_TD, active_TF in layer_batches(store, split, layer):
        logits_TF = predictors.layers[layer].logits(x_TD)
        total = total.plus(count(logits_TF >= predictors.threshold, active_TF))
    return total


def _misses(
    predictors: PredictorSet, reference: list[Counts], store: ActivationStore
) -> dict[str, Any]:
    """Ours at the very predicted sparsity that the reference has on held-out, layer by layer."""
    recalls = []
    for layer, theirs in enumerate(reference):
        predictor, histogram = predictors.layers[layer], ScoreHistogram()
        constant_R = constant_combination(predictor, store, layer)
        for x_TD, active_TF in layer_batches(store, HELD_OUT, layer):
            score_TF = predictor.logits(x_TD) / bias_of(predictor, constant_R, x_TD)
            histogram.add(score_TF, active_TF)
        recalls.append(histogram.at(histogram.threshold_for_sparsity(theirs.predicted_sparsity))[0])
    ours = [1 - recall for recall in recalls]
    theirs_missed = [1 - counts.recall for counts in reference]
    return {
        "dtype": predictors.layers[0].dtype,
        "rank": predictors.layers[0].rank,
        "bytes": predictors.nbytes,
        "recall": sum(recalls) / len(recalls),
        "miss_ratio": _ratio(sum(ours), sum(theirs_missed)),
        "miss_ratio_layers": [_ratio(a, b) for a, b in zip(ours, theirs_missed, strict=True)],
    }


def _ratio(ours: float, theirs: float) -> float | None:
    """None where the reference misses nothing."""
    return ours / theirs if theirs else None


def _perplexity(
    cfg: CompareConfig, store: ActivationStore, reference: PredictorSet, ours: PredictorSet
) -> dict[str, Any]:
    model = load_recorded(cfg.model, store, pick_device(cfg.device))
    chosen, held = recorded_documents(store), recorded_documents(store, HELD_OUT)
    limit = (1 + cfg.perplexity) * perplexity(model, chosen)

    def fits(threshold: float) -> bool:
        with predictors_in_loop(model, replace(reference, threshold=threshold)):
            return perplexity(model, chosen) <= limit

    if not fits(LOWEST):
        raise InputError(
            f"--perplexity: the reference changes it by more than {cfg.perplexity:.3%} even at a "
            f"threshold of {LOWEST:g}; allow more"
        )
    low, high = LOWEST, HIGHEST
    for _ in range(SWEEP):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    swept = replace(reference, threshold=low)
    dense = perplexity(model, held)
    result: dict[str, Any] = {"limit": cfg.perplexity}
    for name, predictors in (("reference", swept), ("ours", ours)):
        counts = [_reference_counts(predictors, store, layer) for layer in store.manifest.layers]
        with predictors_in_loop(model, predictors):
            change = perplexity(model, held) / dense - 1
        result[name] = {
            "dtype": predictors.layers[0].dtype,
            "rank": sum(layer.rank for layer in predictors.layers) / len(predictors.layers),
            "threshold": predictors.threshold,
            "held_out_change": change,
            **_means(counts),
            **_traffics(predictors, counts, store),
        }
    result["traffic_ratio"] = result["ours"]["traffic"] / result["reference"]["traffic"]
    result["cascade_ratio"] = result["ours"]["cascade"] / result["reference"]["cascade"]
    result["over_oracle"] = result["ours"]["traffic"] / result["ours"]["oracle"]
    return result


def _traffics(
    predictors: PredictorSet, counts: list[Counts], store: ActivationStore
) -> dict[str, float]:
    rows = [
        traffic(
            rank=predictor.rank,
            hidden_size=store.manifest.hidden_size,
            ffn_width=store.manifest.ffn_width,
            matrices=store.manifest.ffn_matrices,
            recall=c.recall,
            predicted_sparsity=c.predicted_sparsity,
            true_sparsity=c.true_sparsity,
            predictor_bits=BITS[predictor.dtype],
        )._asdict()
        for predictor, c in zip(predictors.layers, counts, strict=True)
    ]
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def _show(result: dict[str, Any]) -> None:
    reference = result["reference"]
    table = Table(
        title=f"misses at the reference's predicted sparsity ({reference['predicted_sparsity']:.4f}"
        f" on {result['held_out_tokens']:,} held-out tokens)",
        title_justify="left",
    )
    for name in ("", "rank", "format", "bytes", "recall", "misses against reference"):
        table.add_column(name, justify="right" if name else "left")
    table.add_row(
        "reference",
        str(reference["rank"]),
        "f16",
        f"{reference['bytes']:,}",
        f"{reference['recall']:.4f}",
        "1",
    )
    for name in ("same_rank", "same_bytes"):
        row = result[name]
        table.add_row(
            name.replace("_", " "),
            str(row["rank"]),
            row["dtype"],
            f"{row['bytes']:,}",
            f"{row['recall']:.4f}",
            "-" if row["miss_ratio"] is None else f"{row['miss_ratio']:.3f}",
        )
    show(table)
    at = result["perplexity"]
    table = Table(title=f"at most {at['limit']:+.2%} perplexity", title_justify="left")
    for name in (
        "",
        "rank",
        "format",
        "held-out change",
        "recall",
        "predicted sparsity",
        "traffic",
        "cascade",
        "exact",
        "oracle",
    ):
        table.add_column(name, justify="right" if name else "left")
    for name in ("reference", "ours"):
        row = at[name]
        scores = ("recall", "predicted_sparsity", "traffic", "cascade", "exact", "oracle")
        table.add_row(
            name,
            f"{row['rank']:g}",
            row["dtype"],
            f"{row['held_out_change']:+.3%}",
            *(f"{row[key]:.4f}" for key in scores),
        )
    show(table)
    log.info(
        f"traffic {at['traffic_ratio']:.3f} times the reference's, cascade "
        f"{at['cascade_ratio']:.3f} times; {at['over_oracle']:.2f} times the oracle"
    )
