"""Recognize folders that sparsecast wrote, to explain one given in another's place."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from sparsecast.core.errors import InputError
from sparsecast.core.files import read_json

KINDS = {
    "activations": "activations of `sparsecast collect`, which --activations takes",
    "predictors": "predictors of `sparsecast train`, which --predictors takes",
    "bundle": "a bundle of `sparsecast export`, which `sparsecast verify` takes",
    "report": "a report of `sparsecast report`, which no stage reads",
    "model": "a model, which --model takes",
    "gguf": "a file of `sparsecast export --format gguf`, which llama.cpp runs",
    "text": "text, which --corpus takes",
}
MANY = 100
"""Folders in a folder that are looked into."""


def folder_kind(folder: Path) -> str | None:
    """Return the kind of a folder, a key of `KINDS`; the folder need not be complete or intact."""
    if any(folder.glob("model_*.pt")):
        return "predictors"
    if any(folder.glob("*.powerinfer.gguf")):
        return "bundle"
    if any(folder.glob("train-*.safetensors")) or "shard_tokens" in _keys(folder, "manifest.json"):
        return "activations"
    if (folder / "report.json").is_file():
        return "report"
    if {"model_type", "architectures"} & _keys(folder, "config.json"):
        return "model"
    return "gguf" if any(folder.glob("*.gguf")) else None


def _keys(folder: Path, name: str) -> set[str]:
    try:
        return set(read_json(folder / name, name))
    except InputError:
        return set()


def check_folder_kind(path: Path, wanted: str) -> None:
    """Raise `InputError` if `path` holds another kind than `wanted`.

    Also raised if its parent or a folder in it holds the wanted kind. Folders that sparsecast did
    not write are left to the caller.
    """
    if path.is_file() and folder_kind(path.parent) == wanted:
        raise InputError(f"{path}: is a file, expected its folder; give {path.parent}")
    if (kind := folder_kind(path)) not in (None, wanted):
        raise InputError(f"{path}: holds {KINDS[str(kind)]}; expected {KINDS[wanted]}")
    if kind is None:
        inner = sorted(islice((p for p in path.glob("[!.]*/") if p.is_dir()), MANY))
        if (found := next((p for p in inner if folder_kind(p) == wanted), None)) is not None:
            raise InputError(
                f"{path}: holds none itself, expected {KINDS[wanted]}; give a folder in it, such "
                f"as {found}"
            )
