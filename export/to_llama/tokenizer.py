"""The tokenizer of a converted MiniCPM: its files, with BOS and a chat template.

A MiniCPM must see BOS first. In its own files a class of transformers may add it, which other
versions of transformers and other programs do not. Here tokenizer.json adds it itself, as its
post-processing step, so that `tokenizer(text)` begins with exactly one BOS wherever that file is
read. The class becomes PreTrainedTokenizerFast, which takes the file as it stands.

The template is that of MiniCPM's chat models (`<user>prompt<AI>`, turns without a separator), with
BOS: `apply_chat_template` tokenizes without special tokens of its own. A template that the model
has is kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase as Tokenizer

from sparsecast.core.errors import InputError
from sparsecast.core.files import write_json, write_text
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.pretrained import load_pretrained_tokenizer
from sparsecast.core.tokenizers.copies import keep_files
from sparsecast.core.tokenizers.files import settings_of
from sparsecast.core.tokenizers.loading import load_tokenizer

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<用户>' + message['content'] | trim + '<AI>' }}"
    "{% else %}{{ message['content'] | trim }}{% endif %}"
    "{% endfor %}"
)
"""The turn of the assistant is open behind every `<AI>`, with `add_generation_prompt` or without:
MiniCPM's own template does the same."""
KINDS = ("bos_token", "eos_token", "unk_token", "pad_token")


def write_tokenizer(tokenizer: Tokenizer, source: Path, folder: Path, *, minicpm: bool) -> None:
    """Copy the tokenizer's files; those of a MiniCPM get BOS and, without one, a chat template.

    Raises:
        InputError: The tokenizer names no BOS, or is not of the tokenizers library.
    """
    keep_files(tokenizer, source, folder)
    if not minicpm:
        return
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or tokenizer.bos_token_id is None:
        lacks = "no bos_token" if backend is not None else "no tokenizer.json and no way to make it"
        raise InputError(
            f"{source}: its tokenizer has {lacks}, but a MiniCPM must see BOS first; copy the "
            "tokenizer's whole files from where the model comes from"
        )
    spec = json.loads(backend.to_str())
    spec["post_processor"] = _bos_first(str(tokenizer.bos_token), int(tokenizer.bos_token_id))
    spec["truncation"] = spec["padding"] = None
    write_text(folder / "tokenizer.json", json.dumps(spec, ensure_ascii=False, indent=2) + "\n")
    settings: dict[str, Any] = {**settings_of(source), "add_bos_token": True}
    settings.pop("auto_map", None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    for kind in KINDS:
        if (token := getattr(tokenizer, kind)) is not None:
            settings[kind] = str(token)
    if not tokenizer.chat_template:
        settings["chat_template"] = CHAT_TEMPLATE
    write_json(folder / "tokenizer_config.json", settings)


def _bos_first(token: str, number: int) -> dict[str, Any]:
    """Return the step of tokenizer.json that puts BOS in front of every text."""

    def text(name: str, place: int) -> list[dict[str, Any]]:
        return [
            {"SpecialToken": {"id": token, "type_id": place}},
            {"Sequence": {"id": name, "type_id": place}},
        ]

    return {
        "type": "TemplateProcessing",
        "single": text("A", 0),
        "pair": text("A", 0) + text("B", 1),
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }


def check_tokenizer(
    tokenizer: Tokenizer, checkpoint: Checkpoint, texts: Iterable[str], *, minicpm: bool
) -> None:
    """Check the written tokenizer, by transformers alone and as every stage loads it.

    Args:
        tokenizer: The model's.
        checkpoint: The written folder.

    Raises:
        RuntimeError: A text becomes other ids, or has no or two BOS where it needs one.
    """
    plain, ours = load_pretrained_tokenizer(checkpoint.folder), load_tokenizer(checkpoint)
    for text in texts:
        want = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        for made in (plain, ours) if minicpm else (ours,):
            found = made(text, add_special_tokens=minicpm, verbose=False)["input_ids"]
            if found != ([tokenizer.bos_token_id] if minicpm else []) + want:
                raise RuntimeError(
                    f"the written tokenizer gives other ids for the text that begins {text[:40]!r}"
                )
