"""Read documents from the builtin corpus, files, standard input, or a Hugging Face dataset.

    builtin             sources and docstrings of the standard library and of packages that every
                        installation of sparsecast has; nothing is downloaded
    FILE, FOLDER, GLOB  .txt, .md, .jsonl, .parquet
    -                   standard input: JSON lines where the first line is an object, else text;
                        so are a FIFO and a shell's `<(command)`
    NAME[:CONFIG][@SPLIT]   a dataset on the hub, streamed

A row is a text or a chat, which the model's own template turns into text; see rows.py. A row that
cannot be used is counted and left out; see skipped.py. These faults end a run: a file that cannot
be read or is binary, a .jsonl file in which no line is a JSON object, and a corpus without any row
that can be used.

A document is a row, or a file of text. A text without such a source of its own, in fewer than
`FEW_FILES` files, in a file of more than `LONG_FILE` bytes, or from standard input, is cut at line
breaks into documents of at most `PIECE` characters: as one it would fall into one split whole. The
source's `key` alone decides the split. Line ends and outer white space do not count in it.

With `long_documents` "cut", the texts of rows and files too are cut into pieces, which share their
source's key; a chat never is.

Memory: 1 MiB of a text file that is cut, one row or file of anything else.
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
from typing import Any, Literal, TypeVar

from sparsecast.core.errors import InputError, reason_of
from sparsecast.core.files import unreadable_error
from sparsecast.core.text.builtin import builtin_texts, hash_key
from sparsecast.core.text.corpus_files import SUFFIXES, is_stream, local_files
from sparsecast.core.text.encoding import BLOCK, Utf8Reader
from sparsecast.core.text.rows import Chat, UnusableRowError, parse_row
from sparsecast.core.text.skipped import SkippedRows

PIECE = 6000
"""Characters, about three times the default --seq-len in tokens."""
TOKEN = 10
"""More characters than a token has on average, in any text."""
FEW_FILES = 20
LONG_FILE = 2**20
Content = str | Chat | Iterator[str]
"""A text whole, a chat, or a text in blocks."""
Source = tuple[str, Content, str]
"""Key or "", content, and its place in the corpus."""

LongDocuments = Literal["split", "cut"]
"""What becomes of a document longer than --seq-len: consecutive windows, or its first one alone."""
NO_JSON = 100
"""Lines at the start of a .jsonl file after which it is refused if none is a JSON object."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Document:
    """A text or a chat; `key` names its source and decides its split."""

    key: str
    text: str
    """A chat's contents, one a line."""
    chat: Chat | None = None
    where: str = ""
    """Its place in the corpus, for messages."""


def read_documents(
    spec: str,
    workers: int = 1,
    seq_len: int = 0,
    long_documents: LongDocuments = "cut",
    skipped: SkippedRows | None = None,
) -> Iterator[Document]:
    """Stream the documents of a corpus in an order that depends on the corpus alone.

    Args:
        spec: See above.
        workers: Processes that read the builtin corpus, whose sources must be parsed.
        seq_len: Tokens that a document should be able to fill: with "cut", texts that have a key
            are cut into pieces of `TOKEN * seq_len` characters where that is more than `PIECE`.
        long_documents: See above.
        skipped: Counts the rows that cannot be used.

    Raises:
        InputError: Nothing of that name, an unknown file type, or no text in it.
    """
    skipped = SkippedRows(spec) if skipped is None else skipped
    size = max(PIECE, TOKEN * seq_len)
    for key, content, where in _source(spec, workers, skipped):
        if isinstance(content, tuple):
            text = "\n".join(said for _, said in content)
            docs = iter([Document(key, text, content, where)])
        elif isinstance(content, str) and long_documents == "split":
            docs = iter([Document(key, whole, None, where)] if (whole := content.strip()) else [])
        else:
            blocks = [content] if isinstance(content, str) else content
            cut = split_text(blocks, size if key else PIECE)
            docs = (Document(key or hash_key(piece), piece, None, where) for piece in cut)
        for doc in docs:
            skipped.usable = True
            yield doc
    if skipped.usable:
        return
    if skipped.count:
        raise skipped.error()
    raise InputError(
        f"{spec}: no text in this corpus; expected non-empty {', '.join(SUFFIXES)} files "
        "(.jsonl and .parquet under the key 'text' or 'messages'), a dataset with such a column, "
        "or builtin"
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


def _source(spec: str, workers: int, skipped: SkippedRows) -> Iterator[Source]:
    if not spec.strip():
        raise InputError(
            f"--corpus: is empty; expected a {', '.join(SUFFIXES)} file, a folder, a glob, -, "
            "name[:config][@split], or builtin"
        )
    if spec == "builtin":
        return ((key, _sound(text), key) for key, text in builtin_texts(workers))
    if is_stream(spec):
        raw, where = _stdin() if spec == "-" else _pipe(Path(spec).expanduser())
        return _stream(raw, where, skipped)
    files = local_files(spec)
    return _hub(spec, skipped) if files is None else _local(files, skipped)


def _local(files: list[Path], skipped: SkippedRows) -> Iterator[Source]:
    for path in files:
        suffix = path.suffix.lower()
        if suffix == ".parquet":
            pattern = glob.escape(str(path))
            yield from _rows("parquet", f"{path}", skipped, data_files=pattern, split="train")
            continue
        with path.open("rb") as raw:
            text = Utf8Reader(raw, str(path))
            if suffix == ".jsonl":
                yield from _json_lines(text.lines(), str(path), skipped)
            elif len(files) >= FEW_FILES and path.stat().st_size <= LONG_FILE:
                whole = "".join(text.blocks())
                yield text_key(whole), whole, str(path)
            else:
                yield "", text.blocks(), str(path)
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


def _stream(raw: BufferedReader, where: str, skipped: SkippedRows) -> Iterator[Source]:
    text = Utf8Reader(raw, where)
    while (first := text.line(BLOCK)) and not first.strip():
        pass
    if first.lstrip("\ufeff \t").startswith("{"):
        if not first.endswith(("\n", "\r")):
            first += text.line()
        yield from _json_lines(chain([first], text.lines()), where, skipped)
    else:
        yield "", text.blocks(first), where
    text.tell_replaced()


def _json_lines(lines: Iterable[str], where: str, skipped: SkippedRows) -> Iterator[Source]:
    """Yield the rows of JSON lines.

    Raises:
        InputError: None of the first `NO_JSON` lines is a JSON object, or none at all.
    """
    objects, broken, first = 0, 0, ""
    for number, line in enumerate(lines, 1):
        line = line.lstrip("\ufeff")  # files with byte order marks, one behind the other
        if not line.strip():
            continue
        skipped.read += 1
        place = f"{where}:{number}"
        try:
            row = json.loads(line)
            fault = "" if isinstance(row, dict) else f"is no JSON object but {type(row).__name__}"
        except (ValueError, RecursionError) as error:
            fault = f"not JSON ({error})"
        if not fault:
            objects += 1
            yield from _keyed(row, place, skipped)
            continue
        broken, first = broken + 1, first or f"{place}: {fault}"
        if not objects and broken == NO_JSON:
            break
        skipped.add(place, fault)
    if broken and not objects:
        raise InputError(f"{first}; expected one object a line, with 'text' or 'messages'")


def _keyed(row: dict[str, Any], where: str, skipped: SkippedRows) -> Iterator[Source]:
    """Yield what a row holds, or count the row."""
    try:
        content = parse_row(row)
    except UnusableRowError as error:
        skipped.add(where, error)
        return
    if isinstance(content, str):
        yield text_key(content), _sound(content), where
        return
    key = hash_key(repr([(role, _plain(said)) for role, said in content]))
    yield key, tuple((_sound(role), _sound(said)) for role, said in content), where


def text_key(text: str) -> str:
    """Return a text's key, independent of its line ends and surrounding white space."""
    return hash_key(_plain(text))


def _plain(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


def _hub(spec: str, skipped: SkippedRows) -> Iterator[Source]:
    name, _, split = spec.partition("@")
    name, _, config = name.partition(":")
    return _rows(name, spec, skipped, name=config or None, split=split or "train")


def _rows(path: str, where: str, skipped: SkippedRows, **options: str | None) -> Iterator[Source]:
    import datasets

    try:
        rows = datasets.load_dataset(path, streaming=True, **options)
        for number, row in enumerate(rows, 1):
            skipped.read += 1
            yield from _keyed(row, f"{where}, row {number}", skipped)
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
