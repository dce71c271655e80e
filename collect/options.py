"""What the configurations of all stages have in common: paths, choices and numbers that are what
their fields say, whether they come from the command line, a file or Python."""

from __future__ import annotations

import math
import operator
import os
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from reprlib import Repr
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from sparsecast.collect.errors import InputError

ModelDtype = Literal["auto", "float32", "float16", "bfloat16"]
MOST = 2**31 - 1
"""Of a count that says no other limit."""
MOST_TOKENS = 10**15
MOST_SEED = 2**32 - 1
"""What numpy and Lightning take."""
LIMITS = {"seed": MOST_SEED, "tokens": MOST_TOKENS, "count_tokens": MOST_TOKENS}

_short = Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60


def option_of(name: str) -> str:
    """A field as it is typed."""
    return "--" + name.replace("_", "-")


def shown(value: object) -> str:
    """A value in a message, cut where it is long."""
    return _short.repr(value)


def command_of(stage: str, config: Any) -> str:
    """The command that a configuration stands for, as a shell takes it; defaults are left out."""
    words = ["sparsecast", stage]
    for field in fields(config):
        value = getattr(config, field.name)
        if value is None or value == field.default:
            continue
        items = value if isinstance(value, list) else [value]
        words += [option_of(field.name), *(_word(item) for item in items)]
    return shlex.join(words)


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def without_none(kind: Any) -> Any:
    """`T` of `T | None`; any other type is returned as it is."""
    if get_origin(kind) not in (Union, UnionType):
        return kind
    rest = tuple(arg for arg in get_args(kind) if arg is not NoneType)
    return Union[rest]  # noqa: UP007  # of types known at run time alone


def settle(config: Any, **least: float) -> None:
    """Give every field of a frozen configuration the type that it is annotated with.

    A str becomes a Path where the field is one, a numpy number a Python one.

    Args:
        least: The smallest number that a field may be; unset: 0 for whole numbers.

    Raises:
        InputError: A value of another type, none of a field's choices, NaN, infinity, a number
            below its least or a whole one beyond `LIMITS`, or an empty path.
    """
    kinds = get_type_hints(type(config))
    for field in fields(config):
        value, kind = getattr(config, field.name), without_none(kinds[field.name])
        if value is None:
            continue
        value = _settled(field.name, kind, value)
        for number in value if isinstance(value, list) else [value]:
            whole = isinstance(number, int)
            low = least.get(field.name, 0 if whole else -math.inf)
            if isinstance(number, (int, float)) and number < low:
                raise _beyond(field.name, "least", low, number)
            if whole and number > (most := LIMITS.get(field.name, MOST)):
                raise _beyond(field.name, "most", most, number)
        object.__setattr__(config, field.name, value)


def between(config: Any, low: float, high: float, *names: str) -> None:
    """Raises `InputError` where a field that is set is not above `low` and below `high`."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not low < value < high:
            raise InputError(f"{option_of(name)}: must be in ({low}, {high}), got {shown(value)}")


def _settled(name: str, kind: Any, value: Any) -> Any:
    if get_origin(kind) is list:
        if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
            raise _wrong(name, value, "a list")
        if not (value := list(value)):
            raise InputError(f"{option_of(name)}: is empty; name one, or leave it out")
        return [_settled(name, get_args(kind)[0], item) for item in value]
    if get_origin(kind) is Literal:
        if value not in (choices := get_args(kind)):
            raise _wrong(name, value, ", ".join(choices))
        return value
    if get_origin(kind) in (Union, UnionType):  # a word, or a path
        words = [word for part in get_args(kind) for word in get_args(part)]
        return value if value in words else _settled(name, Path, value)
    return _PLAIN[kind](name, value)


def _wrong(name: str, value: object, expected: str) -> InputError:
    return InputError(f"{option_of(name)}: got {shown(value)}, expected {expected}")


def _beyond(name: str, end: str, limit: float, value: object) -> InputError:
    return InputError(f"{option_of(name)}: must be at {end} {limit:,}, got {shown(value)}")


def _path(name: str, value: Any) -> Path:
    if not isinstance(value, (str, os.PathLike)) or isinstance(text := os.fspath(value), bytes):
        raise _wrong(name, value, "a path")
    if not text or "\0" in text:
        raise _wrong(name, value, "a path")
    return Path(text)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, (str, os.PathLike)) or isinstance(text := os.fspath(value), bytes):
        raise _wrong(name, value, "text")
    if "\0" in text:
        raise _wrong(name, value, "text without NUL")
    return text


def _whole(name: str, value: Any) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise _wrong(name, value, "a whole number") from None
    if isinstance(value, bool):
        raise _wrong(name, value, "a whole number")
    return number


def _real(name: str, value: Any) -> float:
    try:
        number = float(value) if not isinstance(value, (str, bytes, bool)) else math.nan
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise _wrong(name, value, "a number")
    return number


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _wrong(name, value, "true or false")
    return value


_PLAIN = {Path: _path, str: _text, int: _whole, float: _real, bool: _flag}
