"""Find a model's folder from a path, the shipped model's name, or a hub id."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from sparsecast.core.errors import InputError
from sparsecast.core.files import unreadable_error
from sparsecast.core.hub import hub_name, snapshot

TINY_PROSPARSE = Path(__file__).parents[2] / "sparsify" / "tiny-prosparse"
"""The model that ships with the package: a FATReLU llama of 6.8M parameters."""
_GIVE = (
    "give a folder with config.json and weights, a Hugging Face id such as "
    "SparseLLM/prosparse-llama-2-7b, or tiny-prosparse, which comes with the package"
)


def resolve_model(source: str) -> Path:
    """Return a model's local folder: `source`, the shipped model's, or a hub snapshot.

    A name that looks like a path never goes to the network: see core/hub.py.

    Raises:
        InputError: No such folder, no such model on the hub, or neither hub nor cached copy.
    """
    if (folder := find_local(source)) is not None:
        return folder
    path = Path(os.path.expanduser(source))
    try:
        there = bool(source) and bool(path.lstat())
    except PermissionError as error:
        raise unreadable_error(path, error, "a model's folder") from error
    except (OSError, ValueError):  # not there, or no name that a file can have
        there = False
    if there:
        raise InputError(f"{source}: is not a folder, expected a model's; {_GIVE}")
    if (name := hub_name(source)) is None:
        raise InputError(f"{source or repr(source)}: no such model folder; {_GIVE}")
    return snapshot(name, "a model", wanted, wanted(["model.safetensors"]))


def find_local(source: str) -> Path | None:
    """Return a model's folder if it is on this machine, without asking the hub."""
    folder = os.path.expanduser(source)
    if source and os.path.isdir(folder):
        return Path(folder)
    names = (TINY_PROSPARSE.name, f"sparsify/{TINY_PROSPARSE.name}")
    return TINY_PROSPARSE if source in names else None


def wanted(files: Sequence[str]) -> list[str]:
    """Return the file patterns to download: no weights in formats that are not read, no code."""
    safe = any(file.endswith(".safetensors") for file in files)
    weights = "*.safetensors" if safe else "pytorch_model*.bin"
    legal = ["LICENSE*", "NOTICE*", "USE_POLICY*"]
    return ["*.json", weights, "*.model", "*.tiktoken", "*.txt", "*.jinja", *legal]
