"""The stage: what a folder or a file of any stage holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from sparsecast.collect.atomic import refuse_unwritable, write_json
from sparsecast.collect.errors import InputError
from sparsecast.collect.inspect import InspectConfig, Inspection
from sparsecast.collect.inspect import inspect as inspect_store
from sparsecast.collect.progress import console
from sparsecast.collect.store import MANIFEST
from sparsecast.export.config import SUFFIX
from sparsecast.export.gpuidx import SUFFIX as GPUIDX
from sparsecast.export.inspect_file import file_values, plain, show_file, size
from sparsecast.export.verify import bundle_file
from sparsecast.predictors.checkpoint import PredictorSet, load_predictors

SCORES = ("recall", "predicted_sparsity")


def inspect(cfg: InspectConfig) -> Inspection:
    """Show an activation store, a predictor folder, a bundle, or a PWRI, GGUF or gpuidx file.

    Raises:
        InputError: Something else, or damaged.
    """
    path = cfg.path
    if (kind := _kind(path)) == "activations":
        return inspect_store(cfg)
    if cfg.json is not None:
        refuse_unwritable(cfg.json, "--json")
    if kind == "predictors":
        values = _predictor_values(path)
        _show_predictors(values)
    elif kind == "bundle":
        values = _bundle_values(path)
        _show_bundle(values)
    else:
        values = file_values(path)
        show_file(values)
    if cfg.json is not None:
        write_json(cfg.json, values)
    return Inspection(ok=True, values=values)


def _kind(path: Path) -> str:
    if path.is_file():
        return "file"
    if any(path.glob("model_*.pt")):
        return "predictors"
    if any(path.glob(f"*{SUFFIX}")):
        return "bundle"
    if (path / MANIFEST).is_file():
        return "activations"
    found = "holds none of ours" if path.is_dir() else "no such file or folder"
    raise InputError(
        f"{path}: {found}, expected what `sparsecast collect`, `train` or `export` writes, or a "
        "PWRI, GGUF or gpuidx file"
    )


def _predictor_values(path: Path) -> dict[str, Any]:
    predictors = load_predictors(path)
    made = predictors.manifest
    return {
        "kind": "predictors",
        "path": str(path),
        "model": made and made.model,
        "fingerprint": made and made.fingerprint,
        "convention": made and made.convention,
        "activation": made and made.activation,
        "activation_threshold": made and made.activation_threshold,
        "threshold": predictors.threshold,
        "bytes": sum(layer.nbytes for layer in predictors.layers),
        "layers": [_layer(predictors, i) for i in range(len(predictors.layers))],
    }


def _layer(predictors: PredictorSet, i: int) -> dict[str, Any]:
    layer, made = predictors.layers[i], predictors.manifest
    scores: Any = made.calibration[i] if made is not None and i < len(made.calibration) else {}
    return {
        "layer": i,
        "rank": layer.rank,
        "hidden_size": layer.fc1_RD.shape[1],
        "ffn_width": layer.fc2_FR.shape[0],
        "dtype": layer.dtype,
        "bytes": layer.nbytes,
        **{name: _score(scores, name) for name in SCORES},
    }


def _score(scores: Any, name: str) -> float | None:
    """A share, or None for whatever else an edited manifest holds."""
    value = scores.get(name) if isinstance(scores, dict) else None
    return value if isinstance(value, (int, float)) and 0 <= value <= 1 else None


def _show_predictors(values: dict[str, Any]) -> None:
    console.print(f"[bold]{escape(values['path'])}", soft_wrap=True)
    facts = {"threshold": f"{values['threshold']:g}", "size": size(values["bytes"])}
    if values["model"] is not None:
        rule = f"{values['activation']} {values['activation_threshold']}"
        facts |= {
            "model": f"{values['model']} (fingerprint {values['fingerprint']})",
            "activation": f"{rule}, input: {values['convention']}",
        }
    for name, fact in facts.items():
        console.print(f"  {name:<11}{plain(fact)}", soft_wrap=True, highlight=False)
    table = Table(title="predictors, scored on the calibration split", title_justify="left")
    for name in ("layer", "rank", "format", "bytes", "recall", "predicted sparsity"):
        table.add_column(name, justify="right")
    for row in values["layers"]:
        scores = ("" if row[name] is None else f"{row[name]:.4f}" for name in SCORES)
        nbytes = f"{row['bytes']:,}"
        table.add_row(str(row["layer"]), str(row["rank"]), row["dtype"], nbytes, *scores)
    console.print(table)


def _bundle_values(path: Path) -> dict[str, Any]:
    model = bundle_file(path)
    split, predictors = model.with_name(model.name + GPUIDX), path / "predictor"
    files = sorted(p for p in path.rglob("*") if p.is_file())
    return {
        "kind": "bundle",
        "path": str(path),
        "files": [{"name": str(p.relative_to(path)), "bytes": p.stat().st_size} for p in files],
        "model": file_values(model),
        "gpu_split": file_values(split) if split.is_file() else None,
        "predictors": _predictor_values(predictors) if predictors.is_dir() else None,
    }


def _show_bundle(values: dict[str, Any]) -> None:
    total = size(sum(file["bytes"] for file in values["files"]))
    console.print(f"[bold]{escape(values['path'])}", soft_wrap=True)
    table = Table(title=f"{len(values['files'])} files, {total}", title_justify="left")
    table.add_column("file", overflow="fold")
    table.add_column("bytes", justify="right")
    for file in values["files"]:
        table.add_row(plain(file["name"]), f"{file['bytes']:,}")
    console.print(table)
    show_file(values["model"])
    if values["gpu_split"] is not None:
        show_file(values["gpu_split"])
    if values["predictors"] is not None:
        _show_predictors(values["predictors"])
