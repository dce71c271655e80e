"""Compare the tokens that the engine will make of text with the model's own.

The engine splits text in its own way. What the model's tokenizer does otherwise is tolerated as far
as the file says that the user was told of it, and counted again.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers.models import BPE

from sparsecast.export.checks.base import Check
from sparsecast.export.engine.protocol import joined
from sparsecast.export.read.other_tokens import (
    OtherTokens,
    count_other_tokens,
    model_ids,
    sample_documents,
)
from sparsecast.export.read.reader import GGUFFile
from sparsecast.export.read.vocab import Bytes, FileVocabulary, alphabet
from sparsecast.export.read.words import words

RECORD = "sparsecast.other_tokens"
GPT2 = ["ByteLevel"]
FALCON = ["Punctuation", "ByteLevel", "Digits", "Split"]


def recorded(file: GGUFFile) -> OtherTokens | None:
    """Return what export counted; None where it counted nothing.

    Raises:
        ValueError: Not what export writes.
    """
    if (text := file.keys.get(RECORD)) is None:
        return None
    try:
        return OtherTokens(**json.loads(text))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{RECORD} is {text!r}") from error


def check_tokens(
    model: Any, tokenizer: FileVocabulary, docs: list[str], *, told: bool = False
) -> Check:
    """Compare the tokens of held-out text by the file's tokenizer and by the model's.

    A gpt2 vocabulary cannot express a model's own way to split text. Tokens are then compared on
    the engine's words, and the documents that the model's own words change are counted.

    Args:
        model: The model's tokenizer, of transformers.
        told: The file says that the engine makes other tokens than the model.
    """
    own, text = model_ids(model), joined(docs)
    ids = tokenizer.encode(text)
    by_words = isinstance(tokenizer, Bytes)
    want = _on_engine_words(model, text) if by_words else own(text)
    detail = f"{len(ids):,} tokens of held-out text, " + (
        "as by the model's tokenizer"
        if want == ids
        else f"{len(want):,} by the model's tokenizer, not all the same"
    )
    ok = want == ids or (told and not by_words)
    if differ := sum(own(doc) != tokenizer.encode(doc) for doc in docs):
        detail += f"; the engine's way to split text changes {differ} of {len(docs)} documents"
        if by_words and not told and not _is_known(model):
            ok, detail = False, detail + ", and the export did not say so"
    return Check("tokens", ok, detail)


def check_other_tokens(model: Any, tokenizer: FileVocabulary, told: OtherTokens) -> Check:
    """Count again what export counted: more must not differ than the user was told."""
    count = count_other_tokens(model_ids(model), tokenizer.encode, sample_documents())
    detail = f"the engine makes other tokens of {count}"
    if count.sample != told.sample:
        return Check("other tokens", True, f"{detail}; when exported, on other text, of {told}")
    if count != told:
        return Check("other tokens", False, f"{detail}, but when exported of {told}")
    return Check("other tokens", True, f"{detail}, as when exported")


def _on_engine_words(model: Any, text: str) -> list[int]:
    spec = json.loads(model.backend_tokenizer.to_str())["model"]
    bpe = BPE(spec["vocab"], [(left, right) for left, right in spec["merges"]])
    characters = alphabet()
    spelled = ("".join(characters[byte] for byte in word.encode()) for word in words(text))
    return [token.id for word in spelled for token in bpe.tokenize(word)]


def _is_known(model: Any) -> bool:
    """Return whether the tokenizer works as GPT-2's or Falcon's, which need no consent."""
    spec = json.loads(model.backend_tokenizer.to_str())
    cut = spec["pre_tokenizer"]
    steps = [step["type"] for step in cut.get("pretokenizers", [cut])]
    return steps in (GPT2, FALCON) and not spec["normalizer"]
