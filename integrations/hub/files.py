"""Which files of a folder are pushed: those that its kind consists of, and nothing else."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from sparsecast.core.errors import InputError
from sparsecast.core.files import check_file, unreadable_error
from sparsecast.core.folders import KINDS, folder_kind
from sparsecast.core.hub import FILES
from sparsecast.core.tokenizers.files import PAIR, SETTINGS, WHOLE

CARD = "README.md"
MODEL_FACTS = ("sparsify.json", "convert.json")
"""Files of a model that `sparsecast sparsify` or `convert` wrote."""
PATTERNS = {
    **FILES,
    "model": [
        "config.json",
        "generation_config.json",
        "*.safetensors",
        "*.safetensors.index.json",
        "chat_template.jinja",
        "curves/*.csv",
        "curves/*.png",
        "curves/tensorboard/*/events.out.tfevents.*",
        *MODEL_FACTS,
        *WHOLE,
        *PAIR,
        *SETTINGS,
    ],
}
"""Files that each kind consists of."""
LEGAL = [CARD, "LICENSE*", "NOTICE*", "USE_POLICY*"]
"""What any kind may have besides."""
WANT = "a folder that `sparsecast collect`, `train`, `export`, `convert` or `sparsify` wrote"


@dataclass(frozen=True)
class Selection:
    """A folder, and which of its files are pushed."""

    folder: Path
    kind: str
    """A key of `PATTERNS`."""
    files: dict[str, Path]
    """Name in the repository to the file, README.md included if there is one."""
    left: list[str]
    """Files that stay here."""


def select(path: Path, *, shards: bool) -> Selection:
    """Find a folder's kind and files.

    Args:
        shards: Whether the shards of activations are wanted.

    Raises:
        InputError: No folder that a stage has finished, a link among the files, or a name that
            the Hub does not take.
    """
    folder = _folder(path)
    kind = _kind(path, folder)
    files: dict[str, Path] = {}
    left = []
    for name in _walk(folder):
        wanted = belongs(name, kind) and (shards or not _is_shard(name, kind))
        if (folder / name).is_symlink() and (wanted or (folder / name).is_dir()):
            raise InputError(
                f"{path / name}: is a link, expected a file; copy the folder with `cp -rL` and "
                "push the copy"
            )
        if not wanted:
            left.append(name)
            continue
        check_file(folder / name, "a file to push")
        if (public := _public(name)) in files:
            raise InputError(
                f"{path / name}: would be pushed as {public}, as another file; rename it"
            )
        files[public] = folder / name
    return Selection(folder, kind, files, left)


def belongs(name: str, kind: str) -> bool:
    """Return whether a file of this name is pushed with this kind of folder."""
    parts = PurePosixPath(name).parts
    return any(
        len(parts) == len(wanted := pattern.split("/")) and all(map(fnmatchcase, parts, wanted))
        for pattern in (*PATTERNS[kind], *LEGAL)
    )


def _is_shard(name: str, kind: str) -> bool:
    return kind == "activations" and fnmatchcase(name, "*-[0-9]*.safetensors")


def _folder(path: Path) -> Path:
    try:
        path.stat()
    except OSError as error:
        raise unreadable_error(path, error, WANT) from error
    if not path.is_dir():
        raise InputError(f"{path}: is a file, expected {WANT}")
    folder = path.resolve()
    if re.fullmatch(r"\..*\.(part|work)", folder.name):
        raise InputError(
            f"{path}: is unfinished work; run its command again, and push the folder that it writes"
        )
    return folder


def _kind(path: Path, folder: Path) -> str:
    kind = folder_kind(folder)
    if kind in PATTERNS and kind != "model":
        return str(kind)
    if kind == "model" and any((folder / name).is_file() for name in MODEL_FACTS):
        return "model"
    if kind == "model":
        raise InputError(
            f"{path}: holds a model that neither `sparsecast sparsify` nor `convert` wrote; "
            f"expected {WANT}; other models are uploaded with `hf upload`"
        )
    raise InputError(
        f"{path}: holds {KINDS.get(kind or '', 'nothing that sparsecast writes')}; expected {WANT}"
    )


def _walk(folder: Path) -> list[str]:
    """List all files; a link to a folder counts as one, and is not followed."""
    names = []
    for where, folders, files in os.walk(folder, onerror=_cannot_list):
        links = [name for name in folders if os.path.islink(os.path.join(where, name))]
        for name in (*files, *links):
            names.append(Path(where, name).relative_to(folder).as_posix())
    return sorted(names)


def _cannot_list(error: OSError) -> None:
    raise unreadable_error(Path(error.filename), error, "a folder to push") from error


def _public(name: str) -> str:
    """Return a file's name in the repository.

    Raises:
        InputError: The Hub takes no such name.
    """
    if not name.isprintable() or "\\" in name:
        raise InputError(f"{name!r}: is no name of a file on the Hub; rename it")
    # TensorBoard puts the machine's name behind the time.
    return re.sub(r"(events\.out\.tfevents\.\d+)\..*", r"\1.sparsify", name)
