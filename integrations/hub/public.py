"""Take this machine's paths out of what is pushed.

A folder names models and texts as they were given to the command, which may be local paths. In
what is pushed, the model's becomes its hub id where that is known; of other paths the last part
stays. Checksums of manifests are made anew; weights, statistics and tokens are pushed as they are.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sparsecast.collect.store.store import read_manifest as read_store_manifest
from sparsecast.core.errors import InputError
from sparsecast.core.files import json_text, read_bytes, read_json
from sparsecast.core.hub import hub_name
from sparsecast.core.manifests import MANIFEST, write_manifest
from sparsecast.core.messages import log
from sparsecast.core.text.corpus_files import SUFFIXES
from sparsecast.integrations.hub.files import CARD, MODEL_FACTS, Selection
from sparsecast.predictors.manifest import read_manifest as read_predictor_manifest

_NAMED = ("model", "corpus", "options", "recipe")
"""Fields of manifests that may hold paths."""
_KEYS = ("_name_or_path", "name_or_path", "tokenizer_file", "vocab_file", "special_tokens_map_file")
"""Keys of transformers' files that may hold paths."""
_TEXT = (".json", ".md", ".csv", ".jinja", ".txt", ".index")
_PATH = re.compile(
    r"(?<![\w./:@<-])(?:(?:~|(?<!\]\()\.{1,2})/[\w.+@-]+(?:/[\w.+@-]+)*"
    r"|/[\w.+@-]+(?:/[\w.+@-]+)+)/?"
)
"""A path in a card that `sparsecast export` wrote; a relative link is none of this machine."""
_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}\b")
"""An access token of the Hub."""
_LARGEST = 32 << 20
"""Bytes of a text file that is searched."""


def is_local(name: str) -> bool:
    """Return whether the name of a model or a text is a path rather than a hub id."""
    if name.startswith(("/", "./", "../", "~", "\\")) or re.match(r"[A-Za-z]:[\\/]", name):
        return True
    if "://" in name or not re.search(r"[\\/]", name):
        return False
    path = Path(name.partition(":")[0])
    return bool(
        set("*?[") & set(name)
        or path.suffix.lower() in SUFFIXES
        or os.path.lexists(path)
        or hub_name(re.split("[:@]", name)[0]) is None
    )


def last_part(name: str) -> str:
    """Return the last part of a path."""
    return re.split(r"[\\/]", name.rstrip("\\/"))[-1].lstrip("~") or "unnamed"


@dataclass
class Publisher:
    """Turns the files of a folder into those that are pushed."""

    selection: Selection
    names: Mapping[str, str]
    """Local paths to what stands in their place, such as the model's hub id."""

    def public(self, value: Any) -> Any:
        """Return a JSON value with every path in it replaced."""
        if isinstance(value, str):
            return self.names.get(value) or (last_part(value) if is_local(value) else value)
        if isinstance(value, dict):
            return {key: self.public(item) for key, item in value.items()}
        return [self.public(item) for item in value] if isinstance(value, list) else value

    def text(self, text: str) -> str:
        """Return the text of a card with every path in it replaced."""
        for name in sorted(self.names, key=len, reverse=True):
            if re.search(r"[\\/]", name):
                found = re.compile(rf"(?<![\w./-]){re.escape(name)}(?![\w/-])")
                text = found.sub(lambda _, new=self.names[name]: new, text)  # type: ignore[misc]
            else:
                text = text.replace(f"`{name}`", f"`{self.names[name]}`")
        if self.selection.kind != "bundle":
            return text  # written by hand, or quotes what a model wrote
        if cut := sorted({found[0] for found in _PATH.finditer(text)}):
            log.warning(f"{CARD}: of these paths the last part alone is pushed: {', '.join(cut)}")
        return _PATH.sub(lambda found: last_part(found[0]), text)

    def contents(self) -> dict[str, bytes | Path]:
        """Return what is pushed under each name but README.md: the file, or its public contents.

        Raises:
            InputError: A file holds an access token, or a path of this machine that is in no known
                place.
        """
        found: dict[str, bytes | Path] = {
            name: path if (data := self._changed(name, path)) is None else data
            for name, path in self.selection.files.items()
            if name != CARD
        }
        for name, content in found.items():
            if name.endswith(_TEXT):
                data = content if isinstance(content, bytes) else _read(content)
                check_public(name, data, self.selection.folder)
        return found

    def _changed(self, name: str, path: Path) -> bytes | None:
        """Return a file's contents if they differ from the file's."""
        if path.name == MANIFEST:
            return self._manifest(path.parent)
        if name in MODEL_FACTS:
            value = read_json(path, "how the model was made")
            return None if (new := self.public(value)) == value else json_text(new).encode()
        if (
            self.selection.kind == "model"
            and path.suffix == ".json"
            and path.stat().st_size < _LARGEST
        ):
            return self._settings(path)
        return None

    def _manifest(self, folder: Path) -> bytes | None:
        is_store = self.selection.kind == "activations"
        manifest: Any = (read_store_manifest if is_store else read_predictor_manifest)(folder)
        if manifest is None:
            return None
        fields = {name: getattr(manifest, name) for name in _NAMED if hasattr(manifest, name)}
        if (new := self.public(fields)) == fields:
            return None
        with TemporaryDirectory() as scratch:
            write_manifest(Path(scratch), replace(manifest, **new))
            return (Path(scratch) / MANIFEST).read_bytes()

    def _settings(self, path: Path) -> bytes | None:
        """Change the keys of a model's JSON that may hold paths, and nothing else."""
        text = path.read_text(encoding="utf-8")
        value = json.loads(text) if any(f'"{key}"' in text for key in _KEYS) else None
        if not isinstance(value, dict):
            return None
        new = {key: self.public(item) if key in _KEYS else item for key, item in value.items()}
        return (
            None
            if new == value
            else (json.dumps(new, indent=2, ensure_ascii=False) + "\n").encode()
        )


def check_public(name: str, data: bytes, folder: Path) -> None:
    """Refuse a text file with an access token, or with a path of this machine.

    Args:
        folder: The folder that is pushed; its path and those of the home and the current folder
            are looked for, if they are long enough to mean this machine.
    """
    if _TOKEN.search(data):
        raise InputError(
            f"{name}: holds an access token of the Hub (hf_...); remove it, and revoke it"
        )
    for path in {Path.home(), Path.cwd(), folder, folder.parent}:
        if len(path.parts) > 2 and re.search(rb"%b(?![\w])" % re.escape(os.fsencode(path)), data):
            raise InputError(
                f"{name}: holds {path}, a path of this machine, expected none in what is pushed; "
                "take it out of the file"
            )


def _read(path: Path) -> bytes:
    return read_bytes(path, "a text file") if path.stat().st_size < _LARGEST else b""
