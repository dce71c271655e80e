"""Read a checkpoint's tokenizer as the vocabulary of PowerInfer's file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from sparsecast.core.errors import InputError, reason_of
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.tokenizers.files import sentencepiece_file
from sparsecast.core.tokenizers.loading import load_tokenizer
from sparsecast.export.write.vocab import CONTROL, UNUSED, USER, Parts, Vocabulary
from sparsecast.export.write.vocab_bytes import byte_vocabulary, is_byte_level
from sparsecast.export.write.vocab_pieces import json_pieces, model_pieces, space_notes


def read_vocabulary(checkpoint: Checkpoint, size: int) -> Vocabulary:
    """Return the tokenizer's own tokens, its added tokens and padding up to `size`.

    Raises:
        InputError: A kind of tokenizer that the engine does not have, or tokens that it would not
            load or print.
    """
    vocabulary, tokenizer = read_tokens(checkpoint, size)
    notes = list(vocabulary.notes)
    if vocabulary.model == "gpt2" and tokenizer.bos_token_id in tokenizer("")["input_ids"]:
        notes.append(
            f"The tokenizer puts {tokenizer.bos_token} before a text, the engine does not: begin "
            "prompts with it."
        )
    kinds = zip(vocabulary.tokens, vocabulary.types, strict=True)
    user = [token for token, kind in kinds if kind == USER]
    if user and vocabulary.model == "llama":
        notes.append(
            f"The tokenizer recognizes {len(user)} user-defined tokens in a text, {user[0]!r} "
            "first; the engine may split them into other tokens."
        )
    return vocabulary._replace(notes=notes)


def read_tokens(checkpoint: Checkpoint, size: int) -> tuple[Vocabulary, Any]:
    """Return the vocabulary and the tokenizer, without notes on added tokens and BOS.

    Raises:
        InputError: See `read_vocabulary`.
    """
    tokenizer: Any = load_tokenizer(checkpoint)
    path = sentencepiece_file(checkpoint.folder)
    if path is not None:
        parts = model_pieces(path)
        _, spec = tokenizer_spec(checkpoint.folder, tokenizer)
        notes, differences = ([], []) if spec is None else space_notes(spec)
        parts.notes += notes
        parts.differences += differences
    else:
        path, spec = tokenizer_spec(checkpoint.folder, tokenizer)
        parts = _from_spec(path, spec)
    if (largest := max(parts.tokens, default=0)) >= size:
        raise InputError(
            f"{path}: has {largest + 1} pieces, but the model's embedding has {size} rows; give "
            "the tokenizer of this model"
        )
    tokens, types = _rows(parts, tokenizer, size)
    _check_unique(path, tokens)
    special = _special(path, parts, tokenizer, checkpoint.config, size)
    scores = [parts.scores.get(i, 0.0) for i in range(size)] if parts.model == "llama" else []
    vocabulary = Vocabulary(
        parts.model,
        tokens,
        scores,
        types,
        parts.merges,
        special,
        parts.notes,
        parts.differences,
    )
    return vocabulary, tokenizer


def tokenizer_spec(folder: Path, tokenizer: Any) -> tuple[Path, Any]:
    """Return the tokenizer as JSON in the tokenizers library's current format, and its path.

    Without a tokenizer.json it is what transformers builds from vocab.json and merges.txt or from
    tokenizer.model.
    """
    path = folder / "tokenizer.json"
    if path.is_file():
        try:
            return path, json.loads(Tokenizer.from_file(str(path)).to_str())
        except Exception as error:  # the library raises bare Exception
            raise InputError(
                f"{path}: not a tokenizer ({reason_of(error)}); copy the model's own "
                "tokenizer.json here"
            ) from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    spec = None if backend is None else json.loads(backend.to_str())
    named = folder / "vocab.json"
    return named if named.is_file() else folder, spec


def _from_spec(path: Path, spec: Any) -> Parts:
    kind = None if spec is None else spec["model"].get("type")
    if kind == "BPE" and is_byte_level(spec):
        return byte_vocabulary(path, spec)
    if kind == "BPE" and spec["model"]["byte_fallback"]:
        return json_pieces(path, spec)
    if kind == "Unigram":
        raise InputError(
            f"{path}: is a unigram model, expected BPE; the engine merges greedily and would "
            "split text into other tokens than this model was trained on"
        )
    found = f"a {kind} model" if kind != "BPE" else "BPE of characters without byte_fallback"
    raise InputError(
        f"{path}: is {found}, expected sentencepiece BPE or the byte-level BPE of GPT-2; the "
        "engine has no other tokenizer, so this model cannot run there"
    )


def _rows(parts: Parts, tokenizer: Any, size: int) -> tuple[list[str], list[int]]:
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for i in range(size):
        token = added.get(i)
        named = None if token is None else CONTROL if token.special else USER
        tokens.append(parts.tokens.get(i) or (token.content if token else f"<unused_{i}>"))
        types.append(parts.types.get(i) or named or UNUSED)
    return tokens, types


def _special(path: Path, parts: Parts, tokenizer: Any, config: Any, size: int) -> dict[str, int]:
    """Find bos, eos, unk and pad.

    For a bos or eos that the file does not name, the engine uses 1 and 2, or 11 in a gpt2
    vocabulary.
    """
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    for name in ("bos", "eos"):
        configured = getattr(config, f"{name}_token_id", None)
        first = configured[0] if isinstance(configured, list) and configured else configured
        token = tokenizer.added_tokens_decoder.get(first)
        # Config classes have defaults of their own, which may be any token of this tokenizer.
        if ids[name] is None and token is not None and token.special:
            ids[name] = first
    special = {name: i for name, i in ids.items() if i is not None and 0 <= i < size}
    if "eos" in special and "bos" not in special and parts.model == "gpt2":
        special["bos"] = special["eos"]  # the engine never inserts it
    for name in ("bos", "eos"):
        if name not in special:
            raise InputError(
                f"{path.parent}: the tokenizer has no {name}_token within the embedding, and the "
                "engine would use an ordinary token instead; name it in tokenizer_config.json"
            )
    return special


def _check_unique(path: Path, tokens: list[str]) -> None:
    seen: set[str] = set()
    for token in tokens:
        if not token or token in seen:
            raise InputError(
                f"{path}: token {token!r} is empty or a duplicate, which the engine refuses; "
                "give every row of the embedding its own text"
            )
        seen.add(token)
