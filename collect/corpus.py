"""Where text comes from: the builtin corpus, files, standard input, or a Hugging Face dataset.

    builtin             sources and docstrings of the standard library and of packages that every
                        installation of sparsecast has; nothing is downloaded
    FILE, FOLDER, GLOB  .txt, .md, .jsonl, .parquet
    -                   standard input: JSON lines where the first line is an object, else text
    NAME[:CONFIG][@SPLIT]   a dataset on the hub, streamed

A row is a string under `text`, or a chat under `messages` (role, content) or `conversations`
(from, value), which the model's own template turns into text.

A text longer than `PIECE` characters is cut at a line break into several documents; a chat never
is. All pieces of one source share its `key`, and the key alone decides the split, so no file and
no article ever stands on both sides. A corpus of fewer than `FEW_FILES` plain-text files is the
exception: there each piece is its own key, or one large file would all fall into one split.
"""

from __future__ import annotations

import glob
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from sparsecast.collect.builtin import builtin, key_of
from sparsecast.collect.errors import InputError

PIECE = 6000
FEW_FILES = 20
SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
ROLES = {"human": "user", "gpt": "assistant"}
"""ShareGPT's names for the roles that templates know."""

Chat = tuple[tuple[str, str], ...]
"""(role, content) pairs."""


@dataclass(frozen=True, slots=True)
class Document:
    """A text or a chat that gets one BOS; `key` names its source and decides its split."""

    key: str
    text: str
    """A chat's contents, one a line."""
    chat: Chat | None = None


def documents(spec: str, workers: int = 1) -> Iterator[Document]:
    """Stream the documents of a corpus in an order that depends on the corpus alone.

    Args:
        spec: See above.
        workers: Processes that read the builtin corpus, whose sources must be parsed.

    Raises:
        InputError: Nothing of that name, an unknown file type, or no text in it.
    """
    empty = True
    for key, content in _source(spec, workers):
        if isinstance(content, str):
            docs = [Document(key or key_of(piece), piece) for piece in pieces(content)]
        else:
            text = "\n".join(said for _, said in content)
            docs = [Document(key or key_of(text), text, content)] if text.strip() else []
        empty = empty and not docs
        yield from docs
    if empty:
        raise InputError(
            f"{spec}: no text in this corpus; expected non-empty {', '.join(SUFFIXES)} files "
            "(.jsonl and .parquet under the key 'text' or 'messages'), a dataset with such a "
            "column, or builtin"
        )


def pieces(text: str) -> Iterator[str]:
    """Cut at line breaks into pieces of at most about `PIECE` characters; drops blank ones."""
    start = 0
    while start < len(text):
        end = len(text)
        if end - start > PIECE:
            cut = text.rfind("\n", start + PIECE // 2, start + PIECE)
            end = cut + 1 if cut >= 0 else start + PIECE
        if piece := text[start:end].strip():
            yield piece
        start = end


def _source(spec: str, workers: int) -> Iterator[tuple[str, str | Chat]]:
    """(key or "", content) pairs."""
    if spec == "builtin":
        return builtin(workers)
    if spec == "-":
        return _stdin()
    path = Path(spec).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES)
        if not files:
            raise InputError(f"{spec}: no {', '.join(SUFFIXES)} file in this folder")
        return _local(files)
    if path.is_file():
        return _local([path])
    if any(c in spec for c in "*?["):
        if files := sorted(Path(p) for p in glob.glob(str(path), recursive=True)):
            return _local(files)
        raise InputError(f"{spec}: no file matches this pattern")
    if path.suffix in SUFFIXES or spec.startswith(("/", ".", "~")):
        raise InputError(f"{spec}: no such file or folder; check the path of the corpus")
    return _hub(spec)


def _local(files: list[Path]) -> Iterator[tuple[str, str | Chat]]:
    for path in files:
        if path.suffix in (".txt", ".md"):
            text = path.read_text(encoding="utf-8", errors="replace")
            yield (key_of(text) if len(files) >= FEW_FILES else ""), text
        elif path.suffix == ".jsonl":
            with path.open(encoding="utf-8", errors="replace") as lines:
                yield from _json_lines(lines, str(path))
        elif path.suffix == ".parquet":
            yield from _rows("parquet", f"{path}", data_files=str(path), split="train")
        else:
            raise InputError(f"{path}: cannot read this type; expected {', '.join(SUFFIXES)}")


def _stdin() -> Iterator[tuple[str, str | Chat]]:
    lines = iter(sys.stdin)
    first = next((line for line in lines if line.strip()), "")
    if first.lstrip().startswith("{"):
        yield from _json_lines(chain([first], lines), "standard input")
        return
    part: list[str] = []
    size = 0
    for line in chain([first], lines):
        part.append(line)
        size += len(line)
        if size >= PIECE:
            yield "", "".join(part)
            part, size = [], 0
    yield "", "".join(part)


def _json_lines(lines: Iterable[str], where: str) -> Iterator[tuple[str, str | Chat]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{where}:{number}: not JSON ({error}); expected one object a line"
            ) from error
        if not isinstance(row, dict):
            raise InputError(f"{where}:{number}: expected a JSON object with 'text' or 'messages'")
        content = content_of(row, f"{where}:{number}")
        yield key_of(content if isinstance(content, str) else repr(content)), content


def content_of(row: dict[str, Any], where: str) -> str | Chat:
    """The text or the chat of a row of a dataset."""
    if isinstance(text := row.get("text"), str):
        return text
    for column, role, said in (("messages", "role", "content"), ("conversations", "from", "value")):
        turns = row.get(column)
        if turns is None:
            continue
        if isinstance(turns, dict):  # datasets turns a list of records into a record of lists
            turns = [
                dict(zip(turns, values, strict=True))
                for values in zip(*turns.values(), strict=True)
            ]
        if isinstance(turns, list) and all(
            isinstance(turn, dict) and isinstance(turn.get(said), str) and role in turn
            for turn in turns
        ):
            return tuple((ROLES.get(turn[role], turn[role]), turn[said]) for turn in turns)
        raise InputError(
            f"{where}: expected a list of objects with '{role}' and '{said}' under '{column}'"
        )
    raise InputError(
        f"{where}: expected a string under 'text', or a chat under 'messages' or 'conversations'; "
        f"found {', '.join(row) or 'nothing'}"
    )


def _hub(spec: str) -> Iterator[tuple[str, str | Chat]]:
    name, _, split = spec.partition("@")
    name, _, config = name.partition(":")
    return _rows(name, spec, name=config or None, split=split or "train")


def _rows(path: str, where: str, **options: str | None) -> Iterator[tuple[str, str | Chat]]:
    import datasets

    try:
        for row in datasets.load_dataset(path, streaming=True, **options):
            content = content_of(row, where)
            yield key_of(content if isinstance(content, str) else repr(content)), content
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{where}: neither a local corpus nor a dataset that could be read ({reason}); "
            "give a file, a folder, a glob, -, name[:config][@split], or builtin"
        ) from error
