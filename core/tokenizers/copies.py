"""Copy a tokenizer's files from one model's folder to another's."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import PreTrainedTokenizerBase as Tokenizer

FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
    "additional_chat_templates/*",
    "generation_config.json",
    "*.model",
    "*.tiktoken",
)
"""Files of any tokenizer class; `vocab_files_names` of the class adds to them."""


def files_of(tokenizer: Tokenizer, source: Path) -> list[Path]:
    """List the tokenizer's files and generation_config.json in a model's folder."""
    names = (*FILES, *tokenizer.vocab_files_names.values())
    return sorted({path for name in names for path in source.glob(name) if path.is_file()})


def keep_files(tokenizer: Tokenizer, source: Path, folder: Path) -> None:
    """Copy the tokenizer's files and generation_config.json from `source` to `folder`."""
    for path in files_of(tokenizer, source):
        copy = folder / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
