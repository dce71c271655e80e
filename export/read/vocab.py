"""Build the engine's tokenizer from the vocabulary of a PowerInfer file.

Each kind gives the tokens that the engine makes of a text, and the texts that its server prints.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as proto
from tokenizers.models import BPE

from sparsecast.export.read.reader import GGUFFile
from sparsecast.export.read.words import words

NORMAL, UNKNOWN, USER, BYTE = 1, 2, 4, 6


class FileVocabulary(Protocol):
    """What export and verify need from either kind."""

    bos: int | None
    """The token that the engine puts before a text."""
    texts: list[str]
    """The server's text for each token (llama_token_to_piece and the server's format)."""
    excluded: list[int]
    """Tokens that the server must never choose: EOS, and those that crash it."""

    def encode(self, text: str) -> list[int]:
        """Return the engine's ids, without BOS."""
        ...


def tokenizer_of(file: GGUFFile) -> FileVocabulary:
    """Build the tokenizer of a file whose vocabulary `check_vocabulary` has passed."""
    return tokenizer_of_keys(file.keys)


def tokenizer_of_keys(keys: Mapping[str, Any]) -> FileVocabulary:
    """Build the tokenizer from the file's keys, before there is a file."""
    return Bytes(keys) if keys["tokenizer.ggml.model"] == "gpt2" else Pieces(keys)


class Pieces:
    """Sentencepiece BPE.

    It merges by best score, leftmost first, with byte fallback and one space put in front. The
    engine merges whatever forms a token, and finds none of them whole: to sentencepiece all of
    them, control tokens and bytes included, are normal pieces. What becomes none of them is
    spelled in bytes here.
    """

    def __init__(self, keys: Mapping[str, Any]) -> None:
        self.bos: int | None = keys.get("tokenizer.ggml.bos_token_id", 1)
        self.excluded = [keys.get("tokenizer.ggml.eos_token_id", 2)]
        tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
        self.texts = [_piece_text(*pair) for pair in zip(tokens, types, strict=True)]
        self._bytes = [tokens.index(f"<0x{byte:02X}>") for byte in range(256)]
        model = proto.ModelProto()  # type: ignore[attr-defined]  # created at import
        for text, score in zip(tokens, keys["tokenizer.ggml.scores"], strict=True):
            model.pieces.add(piece=text, score=score, type=NORMAL)
        model.pieces.add(piece=max(tokens, key=len) + "?", type=UNKNOWN)  # it demands one
        model.trainer_spec.model_type = model.trainer_spec.BPE
        model.normalizer_spec.add_dummy_prefix = True
        model.normalizer_spec.remove_extra_whitespaces = False
        model.normalizer_spec.escape_whitespaces = True
        self._unknown = len(tokens)
        self._processor: Any = sentencepiece.SentencePieceProcessor(
            model_proto=model.SerializeToString()
        )

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text)
        if self._unknown not in ids:
            return ids
        pieces = self._processor.encode_as_pieces(text)
        found: list[int] = []
        for i, piece in zip(ids, pieces, strict=True):
            if i == self._unknown:
                found += [self._bytes[byte] for byte in piece.encode()]
            else:
                found.append(i)
        return found


def _piece_text(token: str, kind: int) -> str:
    if kind == NORMAL:
        return token.replace("\u2581", " ")
    if kind == BYTE:
        return _printed(bytes([int(token[3:5], 16)]))
    return "\u2585" if kind == UNKNOWN else ""


class Bytes:
    """GPT-2's byte-level BPE, on the engine's own words.

    The engine does not find user-defined tokens. Its server crashes when it chooses a token that
    is part of a character, and drops the probabilities of tokens without text.
    """

    def __init__(self, keys: Mapping[str, Any]) -> None:
        self.bos: int | None = None
        tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
        merges = [tuple(merge.split(" ")) for merge in keys["tokenizer.ggml.merges"]]
        self._bpe = BPE({token: i for i, token in enumerate(tokens)}, merges)
        self._alphabet = alphabet()
        self._known: dict[str, list[int]] = {}
        byte_of = {character: byte for byte, character in enumerate(self._alphabet)}
        raw = [
            bytes(byte_of[character] for character in token) if kind == NORMAL else b""
            for token, kind in zip(tokens, types, strict=True)
        ]
        self.texts = [_printed(text) for text in raw]
        partial = [i for i, text in enumerate(raw) if not text or not _whole(text)]
        self.excluded = sorted({keys["tokenizer.ggml.eos_token_id"], *partial})

    def encode(self, text: str) -> list[int]:
        return [token for word in words(text) for token in self._word(word)]

    def _word(self, word: str) -> list[int]:
        if (ids := self._known.get(word)) is None:
            spelled = "".join(self._alphabet[byte] for byte in word.encode())
            ids = self._known[word] = [token.id for token in self._bpe.tokenize(spelled)]
        return ids


def alphabet() -> list[str]:
    """List GPT-2's character for each byte: itself if printable, else one from U+0100 on."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    return [
        chr(byte) if byte in printed else chr(0x100 + others.index(byte)) for byte in range(256)
    ]


def _printed(text: bytes) -> str:
    """Format bytes as the server does: a byte above 127 by number, invalid UTF-8 replaced."""
    if len(text) == 1 and text[0] > 127:
        return f"byte: \\x{text[0]:x}"
    return text.decode(errors="replace")


def _whole(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True
