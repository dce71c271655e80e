"""Fingerprints of what a command reads, to see whether it is the same when the command runs again.

None of them reads tens of gigabytes: folders of ours state their own checksums, a model has its
fingerprint, and of text of more than `MOST` bytes `MOST` are read, spread over all files.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Any

import xxhash

from sparsecast.core.files import read_json, unreadable_error
from sparsecast.core.hub import local_folder
from sparsecast.core.manifests import stated_checksum
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.text.builtin import PACKAGES
from sparsecast.core.text.corpus_files import is_stream, local_files
from sparsecast.core.tokenizers.files import PAIR, SETTINGS, WHOLE

MOST = 64 << 20
BLOCK = 4096
"""Bytes read at a time where a file is not read whole."""
_INDIFFERENT = {"_name_or_path", "architectures", "auto_map", "transformers_version", "use_cache"}
"""Fields of a config that decide no number."""
_TEMPLATE = "chat_template.jinja"


def fingerprint_inputs(config: Any, checkpoint: Checkpoint | None = None) -> dict[str, Any]:
    """Return a fingerprint of every input that a command's options name, by option.

    It is None for what cannot be compared: standard input, a dataset of the Hub, lm-eval's tasks.

    Args:
        checkpoint: The opened `config.model`, if the caller has it.

    Raises:
        InputError: An input is not there, or cannot be read.
    """
    found: dict[str, Any] = {}
    for field in fields(config):
        read, value = _READERS.get(field.name), getattr(config, field.name)
        if read is None or value is None:
            continue
        if field.name == "model" and checkpoint is not None:
            found["model"] = fingerprint_model(checkpoint)
        else:
            found[field.name] = [read(v) for v in value] if isinstance(value, list) else read(value)
    return found


def fingerprint_model(checkpoint: Checkpoint) -> dict[str, str]:
    """Return fingerprints of a model's weights, of its config and of its tokenizer."""
    config = {k: v for k, v in checkpoint.raw_config.items() if k not in _INDIFFERENT}
    names = (*WHOLE, *PAIR, *SETTINGS, _TEMPLATE)
    paths = sorted({path for name in names for path in checkpoint.folder.glob(name)})
    return {
        "weights": checkpoint.fingerprint,
        "config": _digest_json(config),
        "tokenizer": fingerprint_files(paths),
    }


def fingerprint_corpus(corpus: str) -> Any:
    """Return a fingerprint of local files, or of builtin the versions that it is made of; None for
    a stream or a dataset of the Hub."""
    if corpus == "builtin":
        return _builtin_versions()
    if is_stream(corpus):
        return None
    files = local_files(corpus)
    return None if files is None else fingerprint_files(files)


def fingerprint_predictors(folder: Path | str) -> str:
    """Return the checksum that predictors state, or a fingerprint of those of other tools; the word
    sign, which stands for a rule, is returned as it is."""
    if folder == "sign":
        return "sign"
    there = local_folder(folder, "predictors")
    return stated_checksum(there) or fingerprint_files(sorted(there.glob("model_*.pt")))


def fingerprint_files(paths: Sequence[Path]) -> str:
    """Return the xxh3_128 of files in their order: kinds, sizes, and contents up to `MOST` bytes.

    Of larger files, blocks at equal distances are read, the first and the last among them.
    """
    digest = xxhash.xxh3_128()
    blocks = max(2, MOST // BLOCK // max(1, len(paths)))
    small = sum(path.stat().st_size for path in paths) <= MOST
    for path in paths:
        try:
            size = path.stat().st_size
            digest.update(f"{path.suffix.lower()} {size} ".encode())
            with path.open("rb") as file:
                if small or size <= blocks * BLOCK:
                    digest.update(file.read())
                    continue
                for i in range(blocks):
                    file.seek(i * (size - BLOCK) // (blocks - 1))
                    digest.update(file.read(BLOCK))
        except OSError as error:
            raise unreadable_error(path, error, "an input of the command") from error
    return digest.hexdigest()


def describe_changes(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Name the inputs of `earlier` that have another fingerprint now, and of a model what of it."""
    changes = []
    for name, was in earlier.items():
        found = now.get(name)
        if was is None or found is None or was == found:
            continue
        if isinstance(was, dict) and isinstance(found, dict):
            parts = (key for key in {**was, **found} if was.get(key) != found.get(key))
            changes.append(f"{name} ({', '.join(sorted(map(str, parts)))})")
        else:
            changes.append(name)
    return changes


def _fingerprint_evaluation(path: Path) -> str:
    value = read_json(path, "the JSON of `sparsecast evaluate`")
    return _digest_json({key: item for key, item in value.items() if key != "run"})


def _digest_json(value: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())


def _builtin_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages whose sources the builtin corpus is."""
    distributions = packages_distributions()
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        for name in sorted(set(distributions.get(package, ()))):
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                continue
    return found


_READERS: dict[str, Callable[[Any], Any]] = {
    "model": lambda source: fingerprint_model(Checkpoint(source)),
    "corpus": fingerprint_corpus,
    "sft_corpus": fingerprint_corpus,
    "activations": stated_checksum,
    "predictors": fingerprint_predictors,
    "against": fingerprint_predictors,
    "evaluation": _fingerprint_evaluation,
    "tasks": lambda name: None,
    "include_path": lambda path: None,
}
"""By option."""
