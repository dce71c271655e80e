"""Where text comes from: the builtin corpus, local files, or a Hugging Face dataset.

    builtin             sources and docstrings of the standard library and of packages that every
                        installation of sparsecast has; nothing is downloaded
    FILE, FOLDER, GLOB  .txt, .md, .jsonl (key "text"), .parquet (column "text")
    NAME[:CONFIG][@SPLIT]   a dataset on the hub, streamed, column "text"

A text longer than `PIECE` characters is cut at a line break into several documents. All pieces
of one source share its `key`, and the key alone decides the split, so no file and no article ever
stands on both sides. A corpus of fewer than `FEW_FILES` plain-text files is the exception: there
each piece is its own key, or one large file would all fall into one split.
"""

from __future__ import annotations

import ast
import glob
import importlib.util
import inspect
import json
import sysconfig
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from multiprocessing import get_context
from pathlib import Path

from sparsecast.collect.errors import InputError

PIECE = 6000
FEW_FILES = 20
SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")

# Dependencies of sparsecast, their own dependencies, and nothing under a copyleft licence.
PACKAGES = (
    "datasets",
    "fsspec",
    "huggingface_hub",
    "lightning",
    "matplotlib",
    "networkx",
    "numpy",
    "pandas",
    "rich",
    "safetensors",
    "scipy",
    "sklearn",
    "sympy",
    "torch",
    "torchmetrics",
    "transformers",
)


@dataclass(frozen=True, slots=True)
class Document:
    """A text that gets one BOS; `key` names its source and decides its split."""

    key: str
    text: str


def documents(spec: str, workers: int = 1) -> Iterator[Document]:
    """Stream the documents of a corpus in an order that depends on the corpus alone.

    Args:
        spec: See above.
        workers: Processes that read the builtin corpus, whose sources must be parsed.

    Raises:
        InputError: Nothing of that name, an unknown file type, or no text in it.
    """
    source = _source(spec, workers)
    empty = True
    for key, text in source:
        for piece in pieces(text):
            empty = False
            yield Document(key or _hash(piece), piece)
    if empty:
        raise InputError(
            f"{spec}: no text in this corpus; expected non-empty {', '.join(SUFFIXES)} files "
            "(.jsonl and .parquet under the key 'text'), a dataset with a 'text' column, or builtin"
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


def _source(spec: str, workers: int) -> Iterator[tuple[str, str]]:
    """(key or "", text) pairs."""
    if spec == "builtin":
        return _builtin(workers)
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


def _local(files: list[Path]) -> Iterator[tuple[str, str]]:
    for path in files:
        if path.suffix in (".txt", ".md"):
            text = path.read_text(encoding="utf-8", errors="replace")
            yield (_hash(text) if len(files) >= FEW_FILES else ""), text
        elif path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        text = _json_text(line, f"{path}:{number}")
                        yield _hash(text), text
        elif path.suffix == ".parquet":
            for text in _rows("parquet", f"{path}", data_files=str(path), split="train"):
                yield _hash(text), text
        else:
            raise InputError(f"{path}: cannot read this type; expected {', '.join(SUFFIXES)}")


def _json_text(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error}); expected one object a line") from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise InputError(f"{where}: expected an object with a string under 'text'")
    text: str = row["text"]
    return text


def _hub(spec: str) -> Iterator[tuple[str, str]]:
    name, _, split = spec.partition("@")
    name, _, config = name.partition(":")
    for text in _rows(name, spec, name=config or None, split=split or "train"):
        yield _hash(text), text


def _rows(path: str, where: str, **options: str | None) -> Iterator[str]:
    import datasets

    try:
        rows = datasets.load_dataset(path, streaming=True, **options)
        for row in rows:
            if not isinstance(row.get("text"), str):
                raise InputError(
                    f"{where}: expected a string column 'text', found columns {', '.join(row)}"
                )
            yield row["text"]
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{where}: neither a local corpus nor a dataset that could be read ({reason}); "
            "give a file, a folder, a glob, name[:config][@split], or builtin"
        ) from error


def _builtin(workers: int) -> Iterator[tuple[str, str]]:
    """Every source file twice: its docstrings alone, which read as prose, and as it is.

    Files come in the order of a hash of their names, so that any prefix is a fair sample. The key
    is the module path, which outlives a new version of the package.
    """
    files = {}
    for name in ("stdlib", *PACKAGES):
        for root in _roots(name):
            for path in root.rglob("*.py"):
                parts = path.relative_to(root).parts
                if not {"test", "tests", "site-packages", "idlelib", "lib2to3"} & set(parts):
                    files[f"{name}/{'/'.join(parts)}"] = path
    keys = sorted(files, key=_hash)
    paths = (files[key] for key in keys)
    if workers == 1:
        for key, texts in zip(keys, map(_prose_and_source, paths), strict=True):
            yield from ((key, text) for text in texts)
        return
    # Spawned, not forked: the caller may have threads and a GPU.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        try:
            read = pool.map(_prose_and_source, paths, chunksize=32)
            for key, texts in zip(keys, read, strict=True):
                yield from ((key, text) for text in texts)
        finally:
            pool.shutdown(cancel_futures=True)


def _prose_and_source(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8", errors="replace")
    prose = _docstrings(text)
    return [prose, text] if prose else [text]


def _roots(name: str) -> list[Path]:
    if name == "stdlib":
        return [Path(sysconfig.get_paths()["stdlib"])]
    spec = importlib.util.find_spec(name)
    return [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []


def _docstrings(source: str) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other packages' invalid escapes
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return "\n\n".join(inspect.cleandoc(text) for text in found if text and len(text) > 60)


def _hash(text: str) -> str:
    return blake2b(text.encode("utf-8", errors="surrogatepass"), digest_size=8).hexdigest()
