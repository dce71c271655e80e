"""Refuse a tokenizer that the engine does not have, unless the user has accepted its own."""

from __future__ import annotations

from sparsecast.core.errors import InputError
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.tokenizers.loading import load_tokenizer
from sparsecast.export.read.other_tokens import (
    Encode,
    OtherTokens,
    count_other_tokens,
    model_ids,
    sample_documents,
)
from sparsecast.export.read.vocab import tokenizer_of_keys
from sparsecast.export.write.vocab import Vocabulary


def check_other_tokens(
    checkpoint: Checkpoint,
    vocabulary: Vocabulary,
    *,
    allowed: bool,
    engine: str = "the engine",
    encode: Encode | None = None,
) -> OtherTokens | None:
    """Count, and refuse what is neither the engine's way nor allowed.

    Args:
        engine: Its name in the error.
        encode: Its tokenizer; PowerInfer's when None, whose sentencepiece BPE is llama.cpp's too.

    Returns:
        None where the file's tokenizer is the model's: sentencepiece BPE without a note, or no
        document differs and nothing had to be allowed.

    Raises:
        InputError: The tokenizer does to text what the engine never does, and `allowed` is false.
    """
    differences = vocabulary.differences
    if vocabulary.model == "llama" and not (vocabulary.notes or differences):
        return None
    model = model_ids(load_tokenizer(checkpoint))
    count = count_other_tokens(model, encode or _engine(vocabulary), sample_documents())
    if differences and not allowed:
        raise InputError(
            f"{checkpoint.folder}: its tokenizer {'; '.join(differences)}; {engine} does not, "
            f"and makes other tokens of {count}. It is right for token ids: if it is given those, "
            "accept this with --allow-other-tokens"
        )
    return count if differences or count.documents else None


def _engine(vocabulary: Vocabulary) -> Encode:
    """Return the engine's tokenizer with what the file will hold."""
    keys = {
        "model": vocabulary.model,
        "tokens": vocabulary.tokens,
        "token_type": vocabulary.types,
        "scores": vocabulary.scores,
        "merges": vocabulary.merges,
        "eos_token_id": vocabulary.special["eos"],
    }
    return tokenizer_of_keys({f"tokenizer.ggml.{key}": of for key, of in keys.items()}).encode
