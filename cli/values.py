"""Types of options: how help writes them, and how words of the command line or a file are read.

Words alone are read here; whether a value is one that its field may have, `settle` says.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from sparsecast.collect.atomic import parse_json
from sparsecast.collect.options import shown

Read = Callable[[str], Any]


def is_list(kind: Any) -> bool:
    """Whether an option takes several values."""
    return get_origin(kind) is list


def written(kind: Any) -> str:
    """The type of one value as help shows it."""
    if get_origin(kind) is Literal:
        return "{" + ",".join(get_args(kind)) + "}"
    names = {int: "N", float: "X", str: "TEXT", bool: "true|false"}
    return names.get(kind, "PATH")


def read(kind: Any, value: Any) -> Any:
    """A value of a file: text as on the command line, anything else as it is.

    Raises:
        ValueError: Text that is none of the type, with what was found and expected.
    """
    if is_list(kind):
        if isinstance(value, list):
            return [read(get_args(kind)[0], item) for item in value]
        return read_list(kind)(value) if isinstance(value, str) else value
    return _reader(kind)(value) if isinstance(value, str) else value


def read_list(kind: Any) -> Read:
    """A reader of `a,b` or of a JSON list; one word of several."""
    (item,) = get_args(kind)
    expected = _several(item)

    def reader(text: str) -> list[Any]:
        try:
            words = parse_json(text) if text.startswith("[") else text.split(",")
            found = [read(item, word) for word in words if word != ""]
        except ValueError:
            found = []
        if not found:
            raise ValueError(f"got {shown(text)}, expected {expected}")
        return found

    return reader


def _several(item: Any) -> str:
    if get_origin(item) is Literal:
        return "some of " + ",".join(get_args(item))
    examples = {int: "numbers such as 0,2,5", float: "numbers such as 0.5,0.9"}
    return examples.get(item, "paths such as a,b")


def _reader(kind: Any) -> Read:
    if kind in (int, float):
        words = "a whole number" if kind is int else "a number"

        def number(text: str) -> Any:
            try:
                return kind(text)
            except ValueError:
                raise ValueError(f"got {shown(text)}, expected {words}") from None

        return number
    if kind is bool:
        return _flag
    return str if kind is str or get_origin(kind) is Literal else _path


def _flag(text: str) -> bool:
    known = {"true": True, "yes": True, "false": False, "no": False}
    if (value := known.get(text.lower())) is None:
        raise ValueError(f"got {shown(text)}, expected true or false")
    return value


def _path(text: str) -> Path | str:
    if not text.startswith("~"):
        return text  # which `settle` makes a path of, unless it is empty, or a word like `sign`
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError(f"got {shown(text)}, but nobody of that name has a home") from None
