"""Broken corpora: text, JSON lines and parquet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from broken.bytes_faults import KINDS, content, cut, flipped, in_folder, linked, put
from broken.json_faults import DIGITS, HOSTILE, LONG, nested
from broken.runner import Case, Damage

TEXT, LINES, TABLE = "a.txt", "a.jsonl", "a.parquet"


def write(folder: Path) -> Path:
    """A file of each kind; a reader is given one of them."""
    folder.mkdir()
    (folder / TEXT).write_text("some text\nand more\n")
    (folder / LINES).write_text('{"text": "some text"}\n{"text": "more"}\n')
    pq.write_table(pa.table({"text": ["some text", "more"]}), folder / TABLE)
    return folder


def lines(*rows: Any) -> Damage:
    """Rows instead of the sound ones; a text is a line as it stands."""
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    return content(text + "\n", LINES)


def table(**columns: Any) -> Damage:
    return lambda folder: pq.write_table(pa.table(columns), folder / TABLE)


SOUND = {"text": "some text"}
ROWS: dict[str, Any] = {
    "a list": [1],
    "a number": 1,
    "null": None,
    "a text": '"some text"',
    "nothing in it": {},
    "another column": {"content": "x"},
    "a number for a text": {"text": 1},
    "a list for a text": {"text": ["x"]},
    "an object for a text": {"text": {"a": 1}},
    "white space": {"text": " \n"},
    "an empty text": {"text": ""},
    "a long name": {LONG: 1},
    "an escape in a name": {HOSTILE: 1},
    "chats that are a number": {"messages": 5},
    "a chat of numbers": {"messages": [1, 2]},
    "a turn without a role": {"messages": [{"content": "x"}]},
    "a role of another kind": {"messages": [{"role": 5, "content": "x"}]},
    "an image": {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
    "a part of a long type": {"messages": [{"role": "user", "content": [{"type": LONG}]}]},
    "a part of no type": {"messages": [{"role": "user", "content": [1]}]},
    "a part of a deep type": {"messages": [{"role": "user", "content": [{"type": nested(90)}]}]},
    "a silent chat": {"messages": [{"role": "user", "content": ""}]},
    "an empty chat": {"messages": []},
    "unequal columns": {"messages": {"role": ["user"], "content": []}},
    "no JSON": "some text",
    "half an object": '{"text": "some',
    "NaN alone": "NaN",
    "single quotes": "{'text': 'x'}",
    "lists in lists": "[" * 50_000,
    "objects in objects": '{"text":' * 50_000,
    "a number of 5,000 digits": '{"text": ' + "9" * 5000 + "}",
}
"""Rows that no document can be made of."""
BESIDE: dict[str, Any] = {
    "a lone surrogate": {"text": "a\ud800b"},
    "control characters": {"text": "a\x1b[2Jb\x07"},
    "a huge number beside it": {"text": "x", "n": DIGITS},
    "NaN beside it": '{"text": "x", "n": NaN}',
    "the text twice": '{"text": "x", "text": "y"}',
    "deep lists beside it": {"text": "x", "n": nested(90)},
    "a byte order mark": '\ufeff{"text": "x"}',
    "a blank line before it": '\n\n{"text": "x"}',
    "a million letters": {"text": "x" * 1_000_000},
}
"""Rows that hold a text all the same."""

CASES = [
    *(
        Case(f"{name}: {kind}", in_folder(damage, name), only=name)
        for name in (TEXT, LINES, TABLE)
        for kind, damage in KINDS.items()
        if kind not in ("a FIFO", "a link to a device")  # a stream, as of a shell, is read
    ),
    *(
        Case(f"{name}: a link to it", linked(name), "the file is whole", only=name)
        for name in (TEXT, LINES, TABLE)
    ),
    *(
        Case(f"{TEXT}: {what}", content(data, TEXT), only=TEXT)
        for what, data in {
            "blank": " \n\t\n",
            "NUL bytes": b"some\0text",
            "UTF-16": "some text".encode("utf-16"),
            "UTF-16 without a mark": "some text".encode("utf-16-le"),
            "UTF-32": "some text".encode("utf-32"),
            "zeros": bytes(9999),
            "a zip": b"PK\x03\x04\0\0" + bytes(99),
            "a PNG": b"\x89PNG\r\n\x1a\n\0",
        }.items()
    ),
    *(
        Case(
            f"{TEXT}: {what}",
            content(data, TEXT),
            "read, with a warning where a byte is no UTF-8",
            TEXT,
        )
        for what, data in {
            "Latin-1": b"caf\xe9 and more",
            "a surrogate": b"a\xed\xa0\x80b",
            "ones": b"\xff" * 99,
            "an overlong slash": b"a\xc0\xafb",
            "half a letter": "some text \u20ac".encode()[:-1],
            "control characters": b"a\x1b[2J\x07b",
            "a line without end": b"x" * 3_000_000,
        }.items()
    ),
    *(Case(f"{LINES}: {what}", lines(row, row), only=LINES) for what, row in ROWS.items()),
    *(
        Case(f"{LINES}: {what} among sound rows", lines(SOUND, row), "left out and counted", LINES)
        for what, row in ROWS.items()
    ),
    *(
        Case(f"{LINES}: {what}", lines(row), "a text is there", LINES)
        for what, row in BESIDE.items()
    ),
    Case(f"{LINES}: cut in a row", cut(-5, LINES), "the row is left out and counted", LINES),
    Case(f"{LINES}: NUL bytes", put(3, b"\0\0\0", LINES), only=LINES),
    Case(f"{LINES}: UTF-16", content('{"text": "x"}'.encode("utf-16"), LINES), only=LINES),
    *(
        Case(f"{TABLE}: cut at {share:.0%}", cut(share, TABLE), only=TABLE)
        for share in (0.01, 0.2, 0.5, 0.9, 0.99)
    ),
    *(
        Case(f"{TABLE}: {what}", content(data, TABLE), only=TABLE)
        for what, data in {
            "zeros": bytes(999),
            "the magic alone": b"PAR1",
            "the magic twice": b"PAR1PAR1",
            "a footer of 4 GB": b"PAR1" + bytes(99) + b"\xff\xff\xff\xffPAR1",
            "a footer of 2 GB": b"PAR1" + bytes(99) + b"\xff\xff\xff\x7fPAR1",
            "a footer of zeros": b"PAR1" + bytes(99) + b"\x10\0\0\0PAR1",
            "text": b"some text",
        }.items()
    ),
    *(
        Case(f"{TABLE}: a bit of the footer, {at} from the end", flipped(-at, 7, TABLE), only=TABLE)
        for at in (1, 5, 8)
    ),
    *(
        Case(f"{TABLE}: {what}", damage, only=TABLE)
        for what, damage in {
            "another column": table(x=["a"]),
            "a column of numbers": table(text=[1, 2]),
            "no rows": table(text=pa.array([], pa.string())),
            "nulls alone": table(text=pa.array([None, None], pa.string())),
            "bytes": table(text=[b"\xff\xfe"]),
            "a column with an escape": table(**{"x\x1b[2J": ["a"]}),
            "a column with a long name": table(**{LONG: ["a"]}),
        }.items()
    ),
]
