"""Copy a tokenizer's files, and what belongs beside them, from one model's folder to another's."""

from __future__ import annotations

import shutil
from fnmatch import fnmatch
from pathlib import Path

from transformers import PreTrainedTokenizerBase as Tokenizer

FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
    "*.jinja",
    "additional_chat_templates/*",
    "generation_config.json",
    "tekken.json",
    "*.model",
    "*.tiktoken",
)
"""Files of any tokenizer class; `vocab_files_names` of the class adds to them."""
LEGAL = ("license*", "licence*", "copying*", "notice*", "use_policy*")
"""What licenses ask to be passed on with a changed copy (Apache-2.0, section 4; Llama's), in lower
case. A README describes the source, and the copy gets its own."""
_NEITHER = (".py", ".bin", ".safetensors", ".pt", ".pth", ".gguf")
"""Code and weights, whatever their names."""


def files_of(tokenizer: Tokenizer, source: Path) -> list[Path]:
    """List the files in a model's folder that go along: `FILES`, the class's own, and `LEGAL`."""
    names = (*FILES, *tokenizer.vocab_files_names.values())
    found = {path for name in names for path in source.glob(name)}
    found |= {p for p in source.iterdir() if any(fnmatch(p.name.lower(), name) for name in LEGAL)}
    return sorted(path for path in found if path.is_file() and path.suffix not in _NEITHER)


def keep_files(tokenizer: Tokenizer, source: Path, folder: Path) -> None:
    """Copy what `files_of` lists from `source` to `folder`, byte for byte."""
    for path in files_of(tokenizer, source):
        copy = folder / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
