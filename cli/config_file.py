"""`--config FILE.yaml`: options of one command, under their names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from sparsecast.cli.close import did_you_mean
from sparsecast.cli.values import read
from sparsecast.collect.atomic import read_bytes
from sparsecast.collect.errors import InputError
from sparsecast.collect.options import shown

WHAT = "YAML with one option a line, such as tokens: 1000"


def read_config(path: Path, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a file sets, by field; null leaves one unset.

    Raises:
        InputError: No such file, one that is not YAML, an option that is none, or a value of
            another type.
    """
    try:
        found = yaml.safe_load(read_bytes(path, WHAT))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InputError(
            f"{path}: is not YAML ({' '.join(reason.split())}), expected {WHAT}"
        ) from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: holds {shown(found)}, expected {WHAT}")
    values = {}
    for key, value in found.items():
        name = str(key).replace("-", "_")
        if name not in kinds:
            known = [kind.replace("_", "-") for kind in kinds]
            raise InputError(
                f"{path}: no option is called {shown(key)}{did_you_mean(str(key), known)}"
            )
        if value is None:
            continue
        try:
            values[name] = read(kinds[name], value)
        except ValueError as error:
            raise InputError(f"{path}: {key}: {error}") from error
    return values
