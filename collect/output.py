"""The output folder of a run: check it, lock it, begin it or resume an interrupted run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparsecast.collect.store.store import Manifest, read_manifest
from sparsecast.core import lock
from sparsecast.core.earlier_runs import check_unchanged, compare_options
from sparsecast.core.errors import InputError
from sparsecast.core.files import check_writable_folder, hidden_sibling
from sparsecast.core.manifests import MANIFEST, write_manifest
from sparsecast.core.messages import log


def output_folder(out: Path) -> Path:
    """The folder that `out` names, links followed; it may hold a finished run.

    Raises:
        InputError: It is not a folder, cannot be written, or holds files of no finished run.
    """
    follow = os.path.islink(out) or out.name in ("", "..")
    path = Path(os.path.realpath(out)) if follow else out
    if os.path.isfile(path / MANIFEST):
        return path
    if os.path.exists(path) and not os.path.isdir(path):
        raise InputError(f"{out}: is not a folder, expected one to write; choose another --out")
    check_writable_folder(path)
    if path.is_dir() and any(path.iterdir()):
        raise InputError(
            f"{out}: exists and holds other files, expected a new or empty folder; choose "
            "another --out or remove it"
        )
    return path


def partial_folder(out: Path) -> Path:
    """The hidden folder beside `out` that holds the shards until the collection is complete."""
    return hidden_sibling(out, "part")


@contextmanager
def lock_output(out: Path, work: str = "collection") -> Iterator[None]:
    """Hold the lock of an output folder.

    Args:
        work: Kind of run, for messages.

    Raises:
        InputError: Another run holds the lock, or has just finished the folder.
    """
    with lock.lock_folder(out, work):
        if (out / MANIFEST).is_file():
            raise InputError(
                f"{out}: another {work} has just finished it; run the command again to use it"
            )
        yield


def begin_or_resume(out: Path, manifest: Manifest) -> None:
    """Make the partial folder, or accept the one of an interrupted run with the same options.

    Raises:
        InputError: The interrupted run had other options, or the folder cannot be written.
    """
    partial = partial_folder(out)
    if (earlier := unfinished(out)) is not None:
        check_resumable(out, earlier, manifest)
        for leftover in partial.glob("*.part"):
            leftover.unlink()
        log.info(f"resuming: {len(finished_shards(partial))} finished shards are kept")
        return
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_manifest(partial, manifest)
    except OSError as error:
        raise InputError(
            f"{out}: cannot be written ({error.strerror or error}); choose another --out"
        ) from error


def unfinished(out: Path) -> Manifest | None:
    """Return the manifest of an interrupted run that has finished a shard; None without one."""
    partial = partial_folder(out)
    if not finished_shards(partial) or not (partial / MANIFEST).is_file():
        return None
    return read_manifest(partial)


def check_resumable(out: Path, earlier: Manifest, now: Manifest) -> None:
    """Raise `InputError` if an interrupted run had other options."""
    changes = manifest_differences(earlier, now)
    check_unchanged(partial_folder(out), "an unfinished collection", changes, finished=False)


def finished_shards(folder: Path) -> list[Path]:
    """Return the finished shards in a folder."""
    return sorted(folder.glob("*-*.safetensors"))


def manifest_differences(earlier: Manifest, now: Manifest) -> list[str]:
    """Describe how two manifests differ in anything but counts."""
    before = _options(earlier)
    return compare_options(before, dict.fromkeys(before) | _options(now))


def _options(manifest: Manifest) -> dict[str, Any]:
    """Everything that decides the content of a store."""
    return {
        "the fingerprint of the model's weights": manifest.fingerprint,
        **{f"the model's {name}": value for name, value in sorted(manifest.config.items())},
        "corpus": manifest.corpus,
        "tokenizer": manifest.tokenizer,
        "the model's dtype": manifest.dtype,
        "input dtype": manifest.x_dtype,
        "activation threshold": manifest.activation_threshold,
        "activation": manifest.activation,
        **manifest.options,
    }
