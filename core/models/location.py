"""Find a model's folder from a path, the shipped model's name, or a hub id."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from sparsecast.core.errors import InputError, reason_of
from sparsecast.core.files import unreadable_error
from sparsecast.core.messages import log

TINY_PROSPARSE = Path(__file__).parents[2] / "sparsify" / "tiny-prosparse"
"""The model that ships with the package: a FATReLU llama of 6.8M parameters."""
HUB_SECONDS = 10.0
"""How long the hub may take to answer."""
_GIVE = (
    "give a folder with config.json and weights, a Hugging Face id such as "
    "SparseLLM/prosparse-llama-2-7b, or tiny-prosparse, which comes with the package"
)


def resolve_model(source: str) -> Path:
    """Return a model's local folder: `source`, the shipped model's, or a hub snapshot.

    A name that looks like a path never goes to the network: see `is_path`.

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
    if is_path(source):
        raise InputError(f"{source or repr(source)}: no such model folder; {_GIVE}")
    return _download(source)


def find_local(source: str) -> Path | None:
    """Return a model's folder if it is on this machine, without asking the hub."""
    folder = os.path.expanduser(source)
    if source and os.path.isdir(folder):
        return Path(folder)
    names = (TINY_PROSPARSE.name, f"sparsify/{TINY_PROSPARSE.name}")
    return TINY_PROSPARSE if source in names else None


def is_path(source: str) -> bool:
    """Return whether a name is a path; a hub id is `owner/name` where owner is no folder here."""
    owner, slash, name = source.partition("/")
    if not slash or not owner or not name or "/" in name or "\\" in source:
        return True
    return owner.startswith((".", "~")) or name.startswith(".") or os.path.lexists(owner)


def _download(source: str) -> Path:
    """Download a hub model's snapshot; use the cached copy if the hub does not answer."""
    try:
        info = HfApi().model_info(source, timeout=HUB_SECONDS)
        files = [file.rfilename for file in info.siblings or []]
        return Path(snapshot_download(source, revision=info.sha, allow_patterns=_wanted(files)))
    except (HfHubHTTPError, HFValidationError) as error:
        raise _not_there(source, error) from error
    except Exception as error:  # without a connection the hub's client raises its HTTP library's
        try:
            folder = Path(snapshot_download(source, local_files_only=True))
        except OSError:
            raise _not_there(source, error) from error
        if not constants.HF_HUB_OFFLINE:  # where the user wanted that, it is no news
            log.warning(
                f"{source}: the hub does not answer ({reason_of(error)}); its copy in the cache "
                "is used"
            )
        return folder


def _not_there(source: str, error: Exception) -> InputError:
    return InputError(
        f"{source}: neither a local folder nor a model that could be downloaded "
        f"({reason_of(error)}); check the spelling, the network and `hf auth login`"
    )


def _wanted(files: list[str]) -> list[str]:
    """Return the file patterns to download: no weights in formats that are not read, no code."""
    safe = any(file.endswith(".safetensors") for file in files)
    weights = "*.safetensors" if safe else "pytorch_model*.bin"
    legal = ["LICENSE*", "NOTICE*", "USE_POLICY*"]
    return ["*.json", weights, "*.model", "*.tiktoken", "*.txt", "*.jinja", *legal]
