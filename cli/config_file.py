"""`--config FILE.yaml`: options of one command, under their names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from sparsecast.cli.suggestions import did_you_mean
from sparsecast.cli.values import parse_value
from sparsecast.core.errors import InputError
from sparsecast.core.files import read_bytes
from sparsecast.core.options import convert_value, option_of, short_repr

WHAT = "YAML with one option a line, such as tokens: 1000"


def read_options(path: Path, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Return a file's options by field name; null leaves an option unset.

    Raises:
        InputError: No such file, one that is not YAML, an option that is none, or a value of
            another type.
    """
    data = read_bytes(path, WHAT)
    try:
        found = yaml.safe_load(data)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InputError(
            f"{path}: is not YAML ({' '.join(reason.split())}), expected {WHAT}"
        ) from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: holds {short_repr(found)}, expected {WHAT}")
    known = {form: name for name in kinds for form in (name, name.replace("_", "-"))}
    if stray := found.keys() - known.keys():
        key = min(stray, key=str)
        raise InputError(
            f"{path}: no option is called {short_repr(key)}{did_you_mean(str(key), known)}"
        )
    values = {known[key]: value for key, value in found.items() if value is not None}
    for name, value in values.items():
        try:
            values[name] = convert_value(kinds[name], parse_value(kinds[name], value))
        except ValueError as error:
            raise InputError(f"{path}: {option_of(name)}: {error}") from error
    return values
