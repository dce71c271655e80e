"""Read documents from the builtin corpus, files, standard input, or a Hugging Face dataset.

    builtin             sources and docstrings of the standard library and of packages that every
                        installation of sparsecast has; nothing is downloaded
    FILE, FOLDER, GLOB  .txt, .md, .jsonl, .parquet
    -                   standard input: JSON lines where the first line is an object, else text;
                        so are a FIFO and a shell's `<(command)`
    NAME[:CONFIG][@SPLIT]   a dataset on the hub, streamed

A row is a string under `text`, or a chat under `messages` (role, content) or `conversations`
(from, value), which the model's own template turns into text.

A long text is cut at line breaks into several documents; a chat never is. All pieces of one source
share its `key`, and the key alone decides the split, so no document is split between training and
evaluation. Plain text in fewer than `FEW_FILES` files, in a file of more than `LONG_FILE` bytes, or
from standard input is the exception: there each piece of `PIECE` characters has its own key; else
all of it would fall into one split. Line ends and outer white space do not count in a key.

Memory: 1 MiB of a text file, one row of anything else.
"""

from __future__ import annotations

import glob
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BufferedReader, BytesIO, FileIO, UnsupportedOperation
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from sparsecast.core.errors import InputError, reason_of
from sparsecast.core.files import unreadable_error
from sparsecast.core.text.builtin import builtin_texts, hash_key
from sparsecast.core.text.corpus_files import SUFFIXES, is_stream, local_files
from sparsecast.core.text.encoding import BLOCK, Utf8Reader

PIECE = 6000
"""Characters, about three times the default --seq-len in tokens."""
TOKEN = 10
"""More characters than a token has on average, in any text."""
FEW_FILES = 20
LONG_FILE = 2**20
ROLES = {"human": "user", "gpt": "assistant"}
"""ShareGPT's names for the roles that templates know."""

Chat = tuple[tuple[str, str], ...]
"""(role, content) pairs."""
Content = str | Chat | Iterator[str]
"""A text whole, a chat, or a text in blocks."""


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Document:
    """A text or a chat; `key` names its source and decides its split."""

    key: str
    text: str
    """A chat's contents, one a line."""
    chat: Chat | None = None


def read_documents(spec: str, workers: int = 1, seq_len: int = 0) -> Iterator[Document]:
    """Stream the documents of a corpus in an order that depends on the corpus alone.

    Args:
        spec: See above.
        workers: Processes that read the builtin corpus, whose sources must be parsed.
        seq_len: Tokens that a document should be able to fill: texts are cut into pieces of
            `TOKEN * seq_len` characters where that is more than `PIECE` and they have a key.

    Raises:
        InputError: Nothing of that name, an unknown file type, no text in it, or a row that is
            neither a text nor a chat.
    """
    empty = True
    for key, content in _source(spec, workers):
        if isinstance(content, tuple):
            chat = tuple((role, _sound(said)) for role, said in content)
            text = "\n".join(said for _, said in chat)
            docs = iter([Document(key, text, chat)] if text.strip() else [])
        else:
            blocks = [_sound(content)] if isinstance(content, str) else content
            cut = split_text(blocks, max(PIECE, TOKEN * seq_len) if key else PIECE)
            docs = (Document(key or hash_key(piece), piece) for piece in cut)
        for doc in docs:
            empty = False
            yield doc
    if empty:
        raise InputError(
            f"{spec}: no text in this corpus; expected non-empty {', '.join(SUFFIXES)} files "
            "(.jsonl and .parquet under the key 'text' or 'messages'), a dataset with such a "
            "column, or builtin"
        )


def split_text(blocks: Iterable[str], size: int = PIECE) -> Iterator[str]:
    """Cut a text at line breaks into pieces of at most `size` characters; drops blank ones."""
    rest = ""
    for block in blocks:
        rest += block
        start = 0
        while len(rest) - start > size:
            line = rest.rfind("\n", start + size // 2, start + size)
            end = line + 1 if line >= 0 else start + size
            if piece := rest[start:end].strip():
                yield piece
            start = end
        rest = rest[start:]
    if piece := rest.strip():
        yield piece


def _sound(text: str) -> str:
    """Replace lone surrogates, which JSON can spell but no tokenizer accepts."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def start_reading(spec: str, items: Iterable[T]) -> Iterator[T]:
    """Read the first item now, so that errors appear before a model is loaded.

    Standard input and pipes are left alone, since their first item may be long in coming.
    """
    stream = iter(items)
    if is_stream(spec):
        return stream
    return chain([first] if (first := next(stream, None)) is not None else [], stream)


def _source(spec: str, workers: int) -> Iterator[tuple[str, Content]]:
    """Yield (key or "", content) pairs."""
    if not spec.strip():
        raise InputError(
            f"--corpus: is empty; expected a {', '.join(SUFFIXES)} file, a folder, a glob, -, "
            "name[:config][@split], or builtin"
        )
    if spec == "builtin":
        return iter(builtin_texts(workers))
    if is_stream(spec):
        return _stream(*(_stdin() if spec == "-" else _pipe(Path(spec).expanduser())))
    files = local_files(spec)
    return _hub(spec) if files is None else _local(files)


def _local(files: list[Path]) -> Iterator[tuple[str, Content]]:
    for path in files:
        suffix = path.suffix.lower()
        if suffix == ".parquet":
            yield from _rows("parquet", f"{path}", data_files=glob.escape(str(path)), split="train")
            continue
        with path.open("rb") as raw:
            text = Utf8Reader(raw, str(path))
            if suffix == ".jsonl":
                yield from _json_lines(text.lines(), str(path))
            elif len(files) >= FEW_FILES and path.stat().st_size <= LONG_FILE:
                whole = "".join(text.blocks())
                yield text_key(whole), whole
            else:
                yield "", text.blocks()
            text.tell_replaced()


def _stdin() -> tuple[BufferedReader, str]:
    if sys.stdin is None:
        raise InputError("--corpus -: standard input is closed; pipe text or JSON lines into it")
    try:
        # A file of its own: at an interrupt Python would wait for a reader that holds sys.stdin.
        return BufferedReader(FileIO(os.dup(sys.stdin.fileno()))), "standard input"
    except UnsupportedOperation:
        raw = getattr(sys.stdin, "buffer", None)
        whole = BytesIO(sys.stdin.read().encode()) if raw is None else raw
        return BufferedReader(whole), "standard input"


def _pipe(path: Path) -> tuple[BufferedReader, str]:
    try:
        return path.open("rb"), str(path)
    except OSError as error:
        raise unreadable_error(path, error, "the corpus") from error


def _stream(raw: BufferedReader, where: str) -> Iterator[tuple[str, Content]]:
    text = Utf8Reader(raw, where)
    while (first := text.line(BLOCK)) and not first.strip():
        pass
    if first.lstrip("\ufeff \t").startswith("{"):
        if not first.endswith(("\n", "\r")):
            first += text.line()
        yield from _json_lines(chain([first], text.lines()), where)
    else:
        yield "", text.blocks(first)
    text.tell_replaced()


def _json_lines(lines: Iterable[str], where: str) -> Iterator[tuple[str, Content]]:
    for number, line in enumerate(lines, 1):
        line = line.lstrip("\ufeff")  # files with byte order marks, one behind the other
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{where}:{number}: not JSON ({error}); expected one object a line"
            ) from error
        if not isinstance(row, dict):
            raise InputError(f"{where}:{number}: expected a JSON object with 'text' or 'messages'")
        yield _keyed(row, f"{where}:{number}")


def _keyed(row: dict[str, Any], where: str) -> tuple[str, Content]:
    content = parse_row(row, where)
    if isinstance(content, str):
        return text_key(content), content
    return hash_key(repr([(role, _plain(said)) for role, said in content])), content


def text_key(text: str) -> str:
    """Return a text's key, independent of its line ends and surrounding white space."""
    return hash_key(_plain(text))


def _plain(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


def parse_row(row: dict[str, Any], where: str) -> str | Chat:
    """Return the text or the chat in a dataset's row."""
    if isinstance(text := row.get("text"), str):
        return text
    for column, role, said in (("messages", "role", "content"), ("conversations", "from", "value")):
        turns = row.get(column)
        if turns is None:
            continue
        if isinstance(turns, dict) and all(isinstance(v, list) for v in turns.values()):
            # datasets turns a list of records into a record of lists
            turns = [
                dict(zip(turns, values, strict=True))
                for values in zip(*turns.values(), strict=False)
            ]
        if isinstance(turns, list) and all(
            isinstance(turn, dict)
            and isinstance(turn.get(said), str)
            and isinstance(turn.get(role), str)
            for turn in turns
        ):
            return tuple((ROLES.get(turn[role], turn[role]), turn[said]) for turn in turns)
        raise InputError(
            f"{where}: expected a list of objects with strings under '{role}' and '{said}' in "
            f"'{column}'; correct the row or drop it"
        )
    found = ", ".join(f"{name} ({type(value).__name__})" for name, value in row.items())
    raise InputError(
        f"{where}: expected a string under 'text', or a chat under 'messages' or 'conversations'; "
        f"found {found or 'nothing'}"
    )


def _hub(spec: str) -> Iterator[tuple[str, Content]]:
    name, _, split = spec.partition("@")
    name, _, config = name.partition(":")
    return _rows(name, spec, name=config or None, split=split or "train")


def _rows(path: str, where: str, **options: str | None) -> Iterator[tuple[str, Content]]:
    import datasets

    try:
        rows = datasets.load_dataset(path, streaming=True, **options)
        for number, row in enumerate(rows, 1):
            yield _keyed(row, f"{where}, row {number}")
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        reason = reason_of(error)
        if path == "parquet":
            raise InputError(
                f"{where}: cannot be read as parquet ({reason}); write the file again, its text in "
                "UTF-8, or leave it out"
            ) from error
        raise InputError(
            f"{where}: neither a local corpus nor a dataset that could be read ({reason}); "
            "give a file, a folder, a glob, -, name[:config][@split], or builtin"
        ) from error
