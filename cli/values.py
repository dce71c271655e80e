"""Types of options: how help writes them, and what a word of the command line stands for."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from sparsecast.collect.atomic import parse_json
from sparsecast.collect.options import shown

FLAGS = {"true": True, "yes": True, "false": False, "no": False}


def is_list(kind: Any) -> bool:
    """Whether an option takes several values."""
    return get_origin(kind) is list


def written(kind: Any) -> str:
    """The type of one value as help shows it."""
    if get_origin(kind) is Literal:
        return "{" + ",".join(get_args(kind)) + "}"
    return {int: "N", float: "X", str: "TEXT", bool: "true|false"}.get(kind, "PATH")


def read(kind: Any, text: str) -> Any:
    """What a word stands for; for a list `a,b` or JSON. One that stands for nothing stays a word.

    Raises:
        ValueError: The home folder of nobody.
    """
    if is_list(kind):
        words: list[Any] = [text]
        with suppress(ValueError):
            words = parse_json(text) if text.startswith("[") else text.split(",")
        (item,) = get_args(kind)
        return [read(item, w) if isinstance(w, str) else w for w in words if w != ""]
    if kind is bool:
        return FLAGS.get(text.lower(), text)
    if kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    elif written(kind) == "PATH" and text.startswith("~"):
        try:
            return Path(text).expanduser()
        except RuntimeError:
            raise ValueError(f"got {shown(text)}, but nobody of that name has a home") from None
    return text
