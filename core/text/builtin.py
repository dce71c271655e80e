"""The builtin corpus: Python sources and docstrings that every installation has on disk."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sysconfig
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from hashlib import blake2b
from multiprocessing import get_context
from pathlib import Path

# Dependencies of sparsecast, their own dependencies, and nothing under a copyleft license.
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


def builtin_texts(workers: int) -> Iterator[tuple[str, str]]:
    """Yield (key, text) pairs: every source file's docstrings, which are prose, and the whole file.

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
    keys = sorted(files, key=hash_key)
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


def hash_key(text: str) -> str:
    """Return a text's hash as 16 hex digits."""
    return blake2b(text.encode("utf-8", errors="surrogatepass"), digest_size=8).hexdigest()
