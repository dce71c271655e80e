"""Folders on the Hugging Face Hub: which names are meant, and a snapshot of the files they need.

`owner/name` is the repository's default branch, `owner/name@revision` one of its branches, tags or
commits. A local folder of the same name wins. What is downloaded is data alone, never code.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from sparsecast.core.errors import InputError, reason_of
from sparsecast.core.messages import log

HUB_SECONDS = 10.0
"""How long the hub may take to answer."""
_PREDICTORS = ["manifest.json", "config.json", "model_*.pt"]
FILES = {
    "predictors": _PREDICTORS,
    "bundle": [
        "*.powerinfer.gguf",
        "*.powerinfer.gguf.generated.gpuidx",
        *(f"predictor/{pattern}" for pattern in _PREDICTORS),
        "activation/activation_*.pt",
        "README.md",
    ],
    "activations": ["manifest.json", "stats.safetensors", "*-[0-9]*.safetensors"],
}
"""What of a repository each kind of folder is; see core/folders.py."""
_MARKS = {
    "bundle": "*.powerinfer.gguf",
    "predictors": "model_*.pt",
    "activations": "stats.safetensors",
}
"""A file that only a folder of this kind has."""

Choice = Callable[[Sequence[str]], list[str]]
"""Names of a repository's files to the patterns of those to download."""


class HubName(NamedTuple):
    """A repository, and its revision or None for the default branch."""

    repo: str
    revision: str | None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def is_path(source: str) -> bool:
    """Return whether a name is a path; a hub id is `owner/name` where owner is no folder here."""
    source, at, revision = source.partition("@")
    owner, slash, name = source.partition("/")
    if not slash or not owner or not name or "/" in name or "\\" in source or (at and not revision):
        return True
    return owner.startswith((".", "~")) or name.startswith(".") or os.path.lexists(owner)


def hub_name(source: str) -> HubName | None:
    """Split `owner/name[@revision]`; None for a path."""
    repo, _, revision = source.partition("@")
    return None if is_path(source) else HubName(repo, revision or None)


def local_folder(path: str | Path, *kinds: str) -> Path:
    """Return `path`, or the snapshot of the repository that it names if nothing here has that name.

    Args:
        kinds: What it may hold, keys of `FILES`.

    Raises:
        InputError: No such repository, one that holds something else, or no answer and no copy of
            it in the cache.
    """
    if os.path.lexists(path) or (name := hub_name(str(path))) is None:
        return Path(path)

    held = " or ".join(kinds)
    what = " or ".join("a bundle" if kind == "bundle" else kind for kind in kinds)

    def choose(names: Sequence[str]) -> list[str]:
        if (kind := kind_of(names)) not in kinds:
            found = ", ".join(sorted(names)[:3]) or "nothing"
            raise InputError(
                f"{name}: this repository of the hub holds no {held} (there are {found}); expected "
                f"files such as {' or '.join(_MARKS[kind] for kind in kinds)}"
            )
        return FILES[str(kind)]

    return snapshot(name, what, choose, [pattern for kind in kinds for pattern in FILES[kind]])


def kind_of(names: Sequence[str]) -> str | None:
    """Return which key of `FILES` a repository with files of these names is; None for another."""
    own = [name for name in names if "/" not in name]
    return next((kind for kind, mark in _MARKS.items() if any(fnmatch(n, mark) for n in own)), None)


def remote_kind(name: HubName) -> str | None:
    """Return which key of `FILES` a repository is, from the cache if the hub does not answer.

    None where it is something else, or where nothing is known of it.
    """
    try:
        return kind_of(_names(name))
    except Exception:  # see `snapshot`, which says what is wrong
        try:
            folder = Path(_cached(name, None))
        except OSError:
            return None
        return kind_of([path.name for path in folder.iterdir()])


def snapshot(name: HubName, what: str, choose: Choice, cached: list[str]) -> Path:
    """Download a snapshot; use the cached copy if the hub does not answer.

    Args:
        what: Names what is wanted, for the error.
        cached: Patterns of the files that a copy in the cache must have.

    Raises:
        InputError: No such repository or revision, no permission, or neither the hub nor a copy.
    """
    try:
        # By its name: a revision given as a commit would leave no trace of the name in the cache.
        chosen = choose(_names(name))
        return Path(snapshot_download(name.repo, revision=name.revision, allow_patterns=chosen))
    except InputError:
        raise
    except Exception as error:  # without a connection the hub's client raises its HTTP library's
        if _is_refusal(error):
            raise _not_there(name, what, error) from error
        try:
            folder = Path(_cached(name, cached))
        except OSError:
            raise _not_there(name, what, error) from error
        if not constants.HF_HUB_OFFLINE:  # where the user wanted that, it is no news
            log.warning(
                f"{name}: the hub does not answer ({reason_of(error)}); its copy in the cache "
                "is used"
            )
        return folder


def _names(name: HubName) -> list[str]:
    info = HfApi().model_info(name.repo, revision=name.revision, timeout=HUB_SECONDS)
    return [file.rfilename for file in info.siblings or []]


def _cached(name: HubName, patterns: list[str] | None) -> str:
    """Return the folder of a copy that has what matches `patterns`; `OSError` if there is none."""
    return snapshot_download(
        name.repo, revision=name.revision, local_files_only=True, allow_patterns=patterns or []
    )


def _is_refusal(error: Exception) -> bool:
    """Return whether the hub answered, with a no."""
    if isinstance(error, HfHubHTTPError):
        return error.response is None or error.response.status_code < 500
    return isinstance(error, HFValidationError)


def _not_there(name: HubName, what: str, error: Exception) -> InputError:
    return InputError(
        f"{name}: neither a local folder nor {what} that could be downloaded "
        f"({reason_of(error)}); check the spelling, the network and `hf auth login`"
    )
