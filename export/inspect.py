"""The inspect stage: show what a folder or a file of any stage holds."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table

from sparsecast.collect.inspect import InspectConfig, Inspection
from sparsecast.collect.inspect import inspect as inspect_store
from sparsecast.core.disk import format_bytes, write_result
from sparsecast.core.errors import InputError
from sparsecast.core.files import check_file, check_writable_file, unreadable_error
from sparsecast.core.folders import KINDS, folder_kind
from sparsecast.core.hub import hub_name, local_folder, remote_kind
from sparsecast.core.manifests import MANIFEST
from sparsecast.core.messages import log, show
from sparsecast.core.models.ffns import place_of
from sparsecast.core.models.location import find_local
from sparsecast.export.bundle import GPUIDX_SUFFIX, bundle_file
from sparsecast.export.inspect_model import model_values, show_model
from sparsecast.export.read.inspect_file import file_values, plain, show_file
from sparsecast.predictors.checkpoint import PredictorSet, load_predictors, sizes_on_disk
from sparsecast.predictors.manifest import SCORES


def inspect(cfg: InspectConfig) -> Inspection:
    """Show an activation store, a predictor folder, a bundle, a PWRI, GGUF or gpuidx file, or a
    model: its folder, tiny-prosparse, or the Hugging Face id of any of these.

    Raises:
        InputError: The path holds something else, or is damaged; see `model_values` for a model.
    """
    cfg = replace(cfg, path=_downloaded(cfg.path))
    path = cfg.path
    if (kind := _kind(path)) == "gguf":
        path = _only_file(path)
    if kind == "activations":
        return inspect_store(cfg)
    if cfg.json is not None:
        check_writable_file(cfg.json, "--json")
    if kind == "predictors":
        values = _predictor_values(path)
        _show_predictors(values)
    elif kind == "model":
        values = model_values(cfg)
        show_model(values)
    elif kind == "bundle":
        values = _bundle_values(path)
        _show_bundle(values)
    else:
        values = file_values(path)
        show_file(values)
    if cfg.json is not None:
        write_result(cfg.json, values)
    return Inspection(ok=True, values=values)


def _downloaded(path: Path) -> Path:
    """Return the snapshot of a hub id; a path, and the id of a model, are returned as they are."""
    name = None if os.path.lexists(path) else hub_name(str(path))
    kind = None if name is None else remote_kind(name)
    return path if kind is None else local_folder(path, kind)


def _kind(path: Path) -> str:
    want = (
        "a model, what `sparsecast collect`, `train` or `export` writes, or a PWRI, GGUF or gpuidx "
        "file"
    )
    if not os.path.lexists(path) and (find_local(str(path)) or hub_name(str(path))):
        return "model"
    if not path.is_dir():
        check_file(path, want)  # a device or a FIFO is not opened
        return "file"
    try:
        names = os.listdir(path)
    except OSError as error:
        raise unreadable_error(path, error, want) from error
    kind = folder_kind(path)
    if kind is None and MANIFEST in names:
        return "activations"  # damaged ones, which `inspect_store` describes
    if kind is None and "config.json" in names:
        return "model"
    if kind not in ("activations", "predictors", "bundle", "model", "gguf"):
        what = KINDS.get(kind or "", "nothing that sparsecast writes")
        raise InputError(f"{path}: holds {what}; expected {want}")
    return kind


def _only_file(folder: Path) -> Path:
    found = sorted(folder.glob("*.gguf"))
    if len(found) != 1:
        raise InputError(f"{folder}: holds {len(found)} files *.gguf; name one of them")
    return found[0]


def _predictor_values(path: Path) -> dict[str, Any]:
    predictors = load_predictors(path)
    manifest = predictors.manifest
    return {
        "kind": "predictors",
        "path": str(path),
        "model": manifest and manifest.model,
        "fingerprint": manifest and manifest.fingerprint,
        "convention": manifest and manifest.convention,
        "activation": manifest and manifest.activation,
        "activation_threshold": manifest and manifest.activation_threshold,
        "threshold": predictors.threshold,
        "bytes": predictors.nbytes,
        "layers": [_layer(predictors, i) for i in range(len(predictors.layers))],
    }


def _layer(predictors: PredictorSet, i: int) -> dict[str, Any]:
    layer, manifest = predictors.layers[i], predictors.manifest
    scores: dict[str, float] = {} if manifest is None else manifest.calibration[i]
    place, expert = place_of(i, predictors.experts)
    return {
        "layer": place,
        **({} if expert is None else {"expert": expert}),
        "rank": layer.rank,
        "hidden_size": layer.fc1_RD.shape[1],
        "ffn_width": layer.fc2_FR.shape[0],
        "dtype": layer.dtype,
        "bytes": layer.nbytes,
        **{name: scores.get(name) for name in SCORES},
    }


def _show_predictors(values: dict[str, Any]) -> None:
    log.info(values["path"], extra={"style": "bold"})
    facts = {
        "threshold": f"{values['threshold']:g}",
        "size": sizes_on_disk(values["bytes"], Path(values["path"])),
    }
    if values["model"] is not None:
        rule = f"{values['activation']} {values['activation_threshold']:g}"
        facts |= {
            "model": f"{values['model']} (fingerprint {values['fingerprint']})",
            "activation": f"{rule}, input: {values['convention']}",
        }
    for name, fact in facts.items():
        log.info(f"  {name:<11}{plain(fact)}")
    table = Table(title="predictors, scored on the calibration split", title_justify="left")
    for name in ("layer", "rank", "format", "bytes in PowerInfer", "recall", "predicted sparsity"):
        table.add_column(name, justify="right")
    for row in values["layers"]:
        scores = ("" if row[name] is None else f"{row[name]:.4f}" for name in SCORES)
        nbytes = f"{row['bytes']:,}"
        name = f"{row['layer']}, expert {row['expert']}" if "expert" in row else str(row["layer"])
        table.add_row(name, str(row["rank"]), row["dtype"], nbytes, *scores)
    show(table)


def _bundle_values(path: Path) -> dict[str, Any]:
    model = bundle_file(path)
    split, predictors = model.with_name(model.name + GPUIDX_SUFFIX), path / "predictor"
    return {
        "kind": "bundle",
        "path": str(path),
        "files": [
            {"name": str(p.relative_to(path)), "bytes": p.lstat().st_size} for p in _files(path)
        ],
        "model": file_values(model),
        "gpu_split": file_values(split) if os.path.lexists(split) else None,
        "predictors": _predictor_values(predictors) if os.path.lexists(predictors) else None,
    }


def _files(path: Path) -> list[Path]:
    """List the files; links to folders are not followed, so that none loops."""
    walked = os.walk(path, onerror=_cannot_list)
    return sorted(Path(folder, name) for folder, _, names in walked for name in names)


def _cannot_list(error: OSError) -> None:
    raise unreadable_error(Path(error.filename), error, "a folder of the bundle")


def _show_bundle(values: dict[str, Any]) -> None:
    total = format_bytes(sum(file["bytes"] for file in values["files"]))
    log.info(values["path"], extra={"style": "bold"})
    table = Table(title=f"{len(values['files'])} files, {total}", title_justify="left")
    table.add_column("file", overflow="fold")
    table.add_column("bytes", justify="right")
    for file in values["files"]:
        table.add_row(plain(file["name"]), f"{file['bytes']:,}")
    show(table)
    show_file(values["model"])
    if values["gpu_split"] is not None:
        show_file(values["gpu_split"])
    if values["predictors"] is not None:
        _show_predictors(values["predictors"])
