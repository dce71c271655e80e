"""The tokenizer of a model's folder."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase as Tokenizer

from sparsecast.collect.checkpoint import Checkpoint
from sparsecast.collect.errors import InputError
from sparsecast.collect.pretrained import tokenizer_of


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer beside the weights."""
    try:
        tokenizer: Tokenizer = tokenizer_of(checkpoint.folder)
    except Exception as error:  # a damaged tokenizer file raises whatever it meets
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{checkpoint.folder}: no usable tokenizer ({reason}); expected tokenizer.json or "
            "tokenizer.model beside config.json"
        ) from error
    return tokenizer
