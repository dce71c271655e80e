"""Faults of files that hold a JSON object."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from broken.bytes_faults import KINDS, content, cut, in_folder, linked
from broken.runner import Case, Damage

DEEP = 100_000
NO_OBJECT: dict[str, str | bytes] = {
    "blank": " \n",
    "a list": "[1]",
    "a number": "1",
    "a text": '"{}"',
    "null": "null",
    "two objects": "{}{}",
    "a comma behind the last entry": '{"a": 1,}',
    "single quotes": "{'a': 1}",
    "a comment": "{} // as of today",
    "an unfinished text": '{"a": "b',
    "a line end in a text": '{"a": "b\nc"}',
    "a wrong escape": '{"a": "\\x41"}',
    "NaN": '{"a": NaN}',
    "infinity": '{"a": -Infinity}',
    "a number beyond float64": '{"a": 1e999}',
    "a number of 5,000 digits": '{"a": ' + "9" * 5000 + "}",
    "lists in lists": '{"a": ' + "[" * DEEP + "]" * DEEP + "}",
    "objects in objects": '{"a":' * DEEP + "1" + "}" * DEEP,
    "Latin-1": '{"a": "caf\u00e9"}'.encode("latin-1"),
    "UTF-16": "{}".encode("utf-16"),
    "a surrogate in UTF-8": b'{"a": "\xed\xa0\x80"}',
    "NUL bytes": bytes(64),
    "an LFS pointer": "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
}
"""What is no JSON object, whatever file it is in."""

DIGITS = 10**400
"""A whole number far beyond float64, which JSON and Python can hold."""
LONG = "x" * 100_000
HOSTILE = "\x1b[2J\n\ud800\u202e"
"""Control characters, a line end, a lone surrogate, and a mark that turns the line around."""


def no_object(name: str, *, without: tuple[str, ...] = ()) -> Iterator[Case]:
    """Yield the cases of a file that should hold an object."""
    for what, text in NO_OBJECT.items():
        yield Case(f"{name}: {what}", content(text, name), only=name)
    for what, damage in KINDS.items():
        if what not in without:
            yield Case(f"{name}: {what}", in_folder(damage, name), only=name)
    yield Case(f"{name}: half of it", cut(0.5, name), only=name)
    yield Case(f"{name}: a link to it", linked(name), "the file is whole")


def edited(name: str, change: Callable[[Any], object]) -> Damage:
    """Damage that changes the object in a file in place."""

    def damage(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        change(value)
        (folder / name).write_text(json.dumps(value))

    return damage


def fields(name: str, values: Mapping[str, Any]) -> Damage:
    return edited(name, lambda value: value.update(values))


def without(name: str, field: str) -> Damage:
    return edited(name, lambda value: value.pop(field))


def twice(name: str, field: str, value: Any) -> Damage:
    """The field once more, at the end, where the last one counts."""

    def damage(folder: Path) -> None:
        text = (folder / name).read_text().rstrip()
        assert text.endswith("}")
        (folder / name).write_text(f"{text[:-1]}, {json.dumps(field)}: {json.dumps(value)}}}")

    return damage


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def brief(value: Any) -> str:
    """Return a value's repr for a case's name."""
    text = repr(value)
    return ascii(text if len(text) < 40 else f"{text[:30]}... ({len(text):,})")[1:-1]
