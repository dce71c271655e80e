"""Validation shared by all stages' configurations.

Paths, choices and numbers get the types and ranges of their fields, whether they come from the
command line, a file or Python.
"""

from __future__ import annotations

import math
import operator
import os
import shlex
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from reprlib import Repr
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from sparsecast.core.errors import InputError

ModelDtype = Literal["auto", "float32", "float16", "bfloat16"]
DeviceMap = Literal["auto", "balanced", "balanced_low_0", "sequential"]
MOST = 2**31 - 1
"""The largest count that an option takes, unless `LIMITS` says otherwise."""
MOST_TOKENS = 10**15
MOST_SEED = 2**32 - 1
"""What numpy and Lightning take."""
LIMITS = {"seed": MOST_SEED} | dict.fromkeys(("tokens", "sft_tokens", "count_tokens"), MOST_TOKENS)

_short = Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60


def check_device_map(device_map: str | None, device: str) -> None:
    """Raise `InputError` where both --device-map and --device are given."""
    if device_map is not None and device != "auto":
        raise InputError(
            f"--device-map {device_map}: chooses the devices, so --device {device} cannot be given "
            "with it"
        )


def option_of(name: str) -> str:
    """Return a field as its command-line option."""
    return "--" + name.replace("_", "-")


def short_repr(value: object) -> str:
    """Return a value's repr for a message, shortened if it is long."""
    return _short.repr(value)


def command_of(stage: str, config: Any, leave_out: Collection[str] = ()) -> str:
    """Return the shell command of a configuration, without defaults and `leave_out`."""
    words = ["sparsecast", stage]
    for field in fields(config):
        value = getattr(config, field.name)
        if value is None or value == field.default or field.name in leave_out:
            continue
        items = value if isinstance(value, list) else [value]
        words += [option_of(field.name), *(_word(item) for item in items)]
    return shlex.join(words)


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def without_none(kind: Any) -> Any:
    """Return `T` for `T | None`, and any other type unchanged."""
    if get_origin(kind) not in (Union, UnionType):
        return kind
    rest = tuple(arg for arg in get_args(kind) if arg is not NoneType)
    return Union[rest]  # noqa: UP007  # of types known at run time alone


def validate_fields(config: Any, **least: float) -> None:
    """Give every field of a frozen configuration the type that it is annotated with.

    A str becomes a Path if the field is a path; a numpy number becomes a Python number.

    Args:
        least: The smallest number that a field may be; unset: 0 for whole numbers.

    Raises:
        InputError: A value has another type, is not among the choices, NaN, infinite, too small,
            beyond `LIMITS`, or an empty path.
    """
    for name, kind in get_type_hints(type(config)).items():
        if (value := getattr(config, name)) is None:
            continue
        try:
            value = convert_value(without_none(kind), value)
        except ValueError as error:
            raise InputError(f"{option_of(name)}: {error}") from error
        object.__setattr__(config, name, value)
        for number in value if isinstance(value, list) else [value]:
            low = least.get(name, 0 if isinstance(number, int) else -math.inf)
            most = LIMITS.get(name, MOST) if isinstance(number, int) else math.inf
            if isinstance(number, (int, float)) and not low <= number <= most:
                end = f"least {low:,}" if number < low else f"most {most:,}"
                raise InputError(f"{option_of(name)}: must be at {end}, got {short_repr(number)}")


def check_between(config: Any, low: float, high: float, *names: str) -> None:
    """Raise `InputError` if a field that is set is not above `low` and below `high`."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not low < value < high:
            raise InputError(
                f"{option_of(name)}: must be in ({low}, {high}), got {short_repr(value)}"
            )


def convert_value(kind: Any, value: Any) -> Any:
    """Convert a value to the type of its option.

    Raises:
        ValueError: One of another type, or none of the choices; what was found and expected.
    """
    parts = get_args(kind)
    if get_origin(kind) is list:
        if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
            raise _wrong(value, "a list")
        if not (value := list(value)):
            raise ValueError("is empty; name one, or leave it out")
        return [convert_value(parts[0], item) for item in value]
    if get_origin(kind) is Literal:
        if value not in parts:
            raise _wrong(value, ", ".join(parts))
        return value
    if get_origin(kind) in (Union, UnionType):  # words, or a path
        return value if value in get_args(parts[0]) else convert_value(parts[1], value)
    convert, words = _PLAIN[kind]
    try:
        if isinstance(value, bool) != (kind is bool):
            raise TypeError
        return convert(value)
    except (TypeError, ValueError, OverflowError):
        raise _wrong(value, words) from None


def _wrong(value: object, expected: str) -> ValueError:
    return ValueError(f"got {short_repr(value)}, expected {expected}")


def _text(value: Any) -> str:
    text = os.fspath(value)
    if not isinstance(text, str) or "\0" in text:
        raise ValueError
    return text


def _path(value: Any) -> Path:
    if not (text := _text(value)):
        raise ValueError
    return Path(text)


def _real(value: Any) -> float:
    if isinstance(value, (str, bytes)) or not math.isfinite(number := float(value)):
        raise ValueError
    return number


_PLAIN: dict[Any, tuple[Callable[[Any], Any], str]] = {
    Path: (_path, "a path"),
    str: (_text, "text"),
    int: (operator.index, "a whole number"),
    float: (_real, "a number"),
    bool: (bool, "true or false"),
}
