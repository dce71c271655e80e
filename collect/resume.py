"""The folder of a collection: refused, locked, begun, resumed, or finished already."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sparsecast.collect.store.store import Manifest, read_manifest
from sparsecast.core import lock
from sparsecast.core.errors import InputError
from sparsecast.core.files import check_place
from sparsecast.core.manifests import MANIFEST, write_sealed
from sparsecast.core.messages import log


def target(out: Path) -> Path:
    """The folder to make, links followed.

    Raises:
        InputError: It is no folder, cannot be written, or holds something that no stage has
            finished there.
    """
    follow = os.path.islink(out) or out.name in ("", "..")
    path = Path(os.path.realpath(out)) if follow else out
    if os.path.isfile(path / MANIFEST):
        return path
    if os.path.exists(path) and not os.path.isdir(path):
        raise InputError(f"{out}: is not a folder, expected one to write; choose another --out")
    check_place(path)
    if path.is_dir() and any(path.iterdir()):
        raise InputError(
            f"{out}: exists and holds other files, expected a new or empty folder; choose "
            "another --out or remove it"
        )
    return path


def unfinished(out: Path) -> Path:
    """Where the folder grows until it is complete."""
    return out.with_name(f".{out.name}.part")


@contextmanager
def locked(out: Path, work: str = "collection") -> Iterator[None]:
    """Keep a second run out of the same folder, which another may just have finished."""
    with lock.locked(out, work):
        if (out / MANIFEST).is_file():
            raise InputError(
                f"{out}: another {work} has just finished it; run the command again to use it"
            )
        yield


def begin(out: Path, manifest: Manifest) -> None:
    """Make the unfinished folder, or accept the one that an interrupted run has left."""
    part = unfinished(out)
    done = shards(part)
    if done and (part / MANIFEST).is_file():
        if changed := differences(read_manifest(part), manifest):
            raise InputError(
                f"{part}: holds an unfinished collection made differently ({'; '.join(changed)}); "
                "repeat the options it was started with, or remove that folder"
            )
        for leftover in part.glob("*.part"):
            leftover.unlink()
        log.info(f"resuming: {len(done)} finished shards are kept")
        return
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        write_sealed(part, manifest)
    except OSError as error:
        raise InputError(
            f"{out}: cannot be written ({error.strerror or error}); choose another --out"
        ) from error


def shards(folder: Path) -> list[Path]:
    """The finished shards in a folder."""
    return sorted(folder.glob("*-*.safetensors"))


def differences(made: Manifest, asked: Manifest) -> list[str]:
    """What two manifests disagree on, counts apart."""
    changed = []
    if made.fingerprint != asked.fingerprint:
        changed.append("the model's weights differ")
    for name in sorted({*made.config, *asked.config}):
        was, now = made.config.get(name), asked.config.get(name)
        if was != now:
            changed.append(f"the model's {name} was {was!r}, now {now!r}")
    pairs = {
        "corpus": (made.corpus, asked.corpus),
        "tokenizer": (made.tokenizer, asked.tokenizer),
        "the model's dtype": (made.dtype, asked.dtype),
        "input dtype": (made.x_dtype, asked.x_dtype),
        "activation threshold": (made.activation_threshold, asked.activation_threshold),
        "activation": (made.activation, asked.activation),
        **{
            name: (made.options.get(name), asked.options.get(name))
            for name in sorted({*made.options, *asked.options})
        },
    }
    changed += [f"{name} was {a!r}, now {b!r}" for name, (a, b) in pairs.items() if a != b]
    return changed
