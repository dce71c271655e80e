"""Types of options: how help shows them, and how words are converted to them."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from sparsecast.core.files import parse_json
from sparsecast.core.options import short_repr

FLAGS = {"true": True, "yes": True, "false": False, "no": False}


def is_list(kind: Any) -> bool:
    """Return whether an option takes several values."""
    return get_origin(kind) is list


def format_type(kind: Any) -> str:
    """Return the type of one value as help shows it."""
    if get_origin(kind) is Literal:
        return "{" + ",".join(get_args(kind)) + "}"
    return {int: "N", float: "X", str: "TEXT", bool: "true|false"}.get(kind, "PATH")


def parse_value(kind: Any, value: Any) -> Any:
    """Convert a word; a list is `a,b` or JSON. Any other value is returned unchanged.

    Raises:
        ValueError: The home folder of nobody.
    """
    if is_list(kind):
        (item,) = get_args(kind)
        words = _words(value) if isinstance(value, str) else value
        return [parse_value(item, word) for word in words] if isinstance(words, list) else words
    if not isinstance(value, str):
        return value
    if kind is bool:
        return FLAGS.get(value.lower(), value)
    if kind in (int, float):
        with suppress(ValueError):
            return kind(value)
    elif format_type(kind) == "PATH" and value.startswith("~"):
        try:
            return Path(value).expanduser()
        except RuntimeError:
            raise ValueError(
                f"got {short_repr(value)}, but nobody of that name has a home"
            ) from None
    return value


def _words(text: str) -> list[Any]:
    with suppress(ValueError):
        words = parse_json(text) if text.startswith("[") else text.split(",")
        return [word for word in words if word != ""]
    return [text]
