"""Show what an activation store holds, how sparse it is, and whether it is intact."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from sparsecast.collect.store.stats import STATS, Stats
from sparsecast.collect.store.store import ActivationStore, Manifest
from sparsecast.collect.store.units import shard_name
from sparsecast.core.disk import write_result
from sparsecast.core.files import check_writable_file
from sparsecast.core.manifests import MANIFEST
from sparsecast.core.messages import log, show
from sparsecast.core.models.ffns import place_of
from sparsecast.core.options import ModelDtype, validate_fields
from sparsecast.core.progress import progress_bar
from sparsecast.core.text.splits import SPLITS
from sparsecast.core.text.tokens import COUNTED


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Show what a model is and which stages can use it, or what activations (with an integrity
    check), predictors, a bundle or a file hold."""

    path: Path
    """A model's folder or tiny-prosparse, a folder written by `sparsecast collect`, `train` or
    `export`, the id of any of these on the Hub, `owner/name[@revision]`, or a PWRI, GGUF or gpuidx
    file."""

    check: bool = True
    """For a model, load it and compare the activation that its config names with others on
    held-out text. For activations, read every shard and compare its checksums; the manifest, the
    statistics and the shards' headers are always compared."""

    corpus: str = "builtin"
    """For a model: the text of the check, named as in `sparsecast collect`."""

    tokens: int = 2_048
    """For a model: held-out tokens of the check."""

    device: str = "auto"
    """For a model: auto, cpu, cuda or cuda:N."""

    dtype: ModelDtype = "auto"
    """For a model: auto (float32 on the CPU, else the checkpoint's), float32, float16 or
    bfloat16."""

    json: Path | None = None
    """Write the numbers to this file."""

    def __post_init__(self) -> None:
        validate_fields(self, tokens=300)


@dataclass(frozen=True)
class Inspection:
    """The numbers, and whether every shard is intact."""

    ok: bool
    values: dict[str, Any]


def inspect(cfg: InspectConfig) -> Inspection:
    """Read a store whole, or all but the shards' data with `check` off.

    Memory: the statistics; shards are memory maps.

    A store of which only manifest and statistics are there is shown without its shards.

    Raises:
        InputError: Not an activation store, or an unusable manifest.
    """
    if cfg.json is not None:
        check_writable_file(cfg.json, "--json")
    store = ActivationStore(cfg.path, checked=False)
    manifest = store.manifest
    bare = not any(map(os.path.lexists, _shards(cfg.path, manifest)))
    damage = _damage(store, whole=cfg.check, bare=bare)
    stored = sum(_size(cfg.path, split, manifest) for split in SPLITS)
    counted = _size(cfg.path, COUNTED, manifest)
    values = {
        "ok": False if damage else True if cfg.check and not bare else None,
        "damage": damage,
        "manifest": asdict(manifest),
        "tokens": {split: sum(tokens) for split, tokens in manifest.shard_tokens.items()},
        "bytes": stored + counted,
        "bytes_per_token_layer": stored / (manifest.tokens() * len(manifest.layers)),
        "bound": manifest.shape.bound,
        "layers": [],
        **({} if damage and STATS in damage[-1] else _tables(store)),
    }
    _show(values, manifest, cfg.path)
    if bare:
        log.info(
            "no shard is here, only manifest and statistics, as `sparsecast push` uploads them"
        )
    if cfg.json is not None:
        write_result(cfg.json, values)
    return Inspection(ok=not damage, values=values)


def _shards(folder: Path, manifest: Manifest) -> Iterator[Path]:
    for split, counts in manifest.shard_tokens.items():
        yield from (folder / shard_name(split, number) for number in range(len(counts)))


def _damage(store: ActivationStore, *, whole: bool, bare: bool) -> list[str]:
    """List what is wrong; in a store without any shard, with the other files alone."""
    found = []
    with progress_bar("check", len(store.manifest.checksums)) as progress:
        for name, what in store.damages(whole=whole):
            if what is not None and (not bare or name in (MANIFEST, STATS)):
                found.append(what)
            progress.advance()
    return found


def _size(folder: Path, split: str, manifest: Manifest) -> int:
    """Bytes of a split's shards that exist."""
    names = (
        shard_name(split, number) for number in range(len(manifest.shard_tokens.get(split, [])))
    )
    return sum((folder / name).stat().st_size for name in names if (folder / name).is_file())


def _tables(store: ActivationStore) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of `layers` and, for a mixture of experts, of `experts`."""
    stats, manifest = store.stats(), store.manifest
    tables = {"layers": [_layer(stats, layer) for layer in manifest.layers]}
    if manifest.experts:
        tables["experts"] = [_expert(stats, ffn) for ffn in manifest.ffns]
    return tables


def _layer(stats: Stats, layer: int) -> dict[str, Any]:
    """Describe a layer; a mixture's neurons are those of all its experts."""
    sparsity = stats.layer_sparsity(layer)
    ffns = [_expert(stats, ffn) for ffn in stats.ffns(layer)]
    return {
        "layer": layer,
        "true_sparsity": sparsity.mean,
        "std": sparsity.std,
        "p5": sparsity.p5,
        "p50": sparsity.p50,
        "p95": sparsity.p95,
        "never_fired": sum(row["never_fired"] for row in ffns),
        "always_fired": sum(row["always_fired"] for row in ffns),
    }


def _expert(stats: Stats, ffn: int) -> dict[str, Any]:
    sparsity, fired_F = stats.token_sparsity(ffn), stats.fired(ffn)
    layer, expert = place_of(ffn, stats.experts)
    return {
        "layer": layer,
        "expert": expert,
        "tokens": sparsity.tokens,
        "true_sparsity": sparsity.mean if sparsity.tokens else None,
        "never_fired": int((fired_F == 0).sum()),
        "always_fired": int((fired_F == sparsity.tokens).sum()) if sparsity.tokens else 0,
    }


def _show(values: dict[str, Any], manifest: Manifest, path: Path) -> None:
    long = "cut" if manifest.options.get("long_documents", "cut") == "cut" else "in windows"
    facts = {
        "model": f"{manifest.model} ({manifest.model_type}, fingerprint {manifest.fingerprint})",
        "corpus": manifest.corpus,
        "tokenizer": manifest.tokenizer,
        "activation": f"{manifest.activation} {manifest.activation_threshold:g}",
        "input": f"{manifest.convention}, {manifest.x_dtype}"
        + (", energies" if manifest.energy else ""),
        "shape": f"{len(manifest.layers)} layers, hidden {manifest.hidden_size}, "
        f"FFN {manifest.ffn_width}" + _experts(manifest),
        "tokens": ", ".join(f"{split} {count:,}" for split, count in values["tokens"].items()),
        "documents": ", ".join(
            f"{split} {count:,} ({manifest.truncated.get(split, 0):,} {long})"
            for split, count in manifest.documents.items()
        )
        + (f"; {manifest.skipped:,} rows could not be used" if manifest.skipped else ""),
        "size": f"{values['bytes'] / 2**20:,.1f} MiB, {values['bytes_per_token_layer']:,.1f} bytes "
        f"per token and layer (bound {values['bound']:,.1f}"
        + (" and one per active entry)" if manifest.energy else ")")
        + (
            "; in a small store what a shard has once weighs more"
            if not manifest.energy and values["bytes_per_token_layer"] > values["bound"]
            else ""
        ),
    }
    log.info(str(path), extra={"style": "bold"})
    for name, fact in facts.items():
        log.info(f"  {name:<11}{fact}")
    table = Table(title="sparsity of single tokens, over every token", title_justify="left")
    for name in ("layer", "mean", "std", "p5", "p50", "p95", "never fired", "always fired"):
        table.add_column(name, justify="right")
    for row in values["layers"]:
        shares = (f"{row[key]:.4f}" for key in ("true_sparsity", "std", "p5", "p50", "p95"))
        counts = (f"{row['never_fired']:,}", f"{row['always_fired']:,}")
        table.add_row(str(row["layer"]), *shares, *counts)
    show(table)
    if values.get("experts"):
        _show_experts(values["experts"])
    for what in values["damage"] or ():
        log.error(what)
    if values["ok"]:
        log.info("every shard is as it was written", extra={"style": "green"})


def _experts(manifest: Manifest) -> str:
    if not manifest.experts:
        return ""
    return f", {manifest.experts} experts per layer, {manifest.experts_per_token} per token"


def _show_experts(rows: list[dict[str, Any]]) -> None:
    """Show how evenly each layer's tokens and sparsities spread over its experts."""
    table = Table(title="experts: tokens routed to each, and sparsity", title_justify="left")
    for name in ("layer", "fewest", "median", "most", "none", "least sparse", "most sparse"):
        table.add_column(name, justify="right")
    for layer in sorted({row["layer"] for row in rows}):
        own = [row for row in rows if row["layer"] == layer]
        tokens = sorted(row["tokens"] for row in own)
        sparsities = [row["true_sparsity"] for row in own if row["tokens"]]
        counts = (tokens[0], tokens[len(tokens) // 2], tokens[-1], tokens.count(0))
        table.add_row(
            str(layer),
            *(f"{count:,}" for count in counts),
            *(f"{share:.4f}" for share in (min(sparsities), max(sparsities))),
        )
    show(table)
