"""Build a tokenizer from the vocabulary of a PowerInfer file, which is of one of two kinds.

Each gives the tokens that the model was trained on and the texts that the engine's server prints.
"""

from __future__ import annotations

from typing import Any, Protocol

import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as proto
from tokenizers import AddedToken, Tokenizer, models
from tokenizers.pre_tokenizers import ByteLevel

from sparsecast.export.read.reader import GGUFFile

NORMAL, UNKNOWN, USER, BYTE = 1, 2, 4, 6


class FileVocabulary(Protocol):
    """What verify needs from either kind."""

    exact: bool
    """Whether the engine splits every text into the same tokens."""
    bos: int | None
    """The token that the engine puts before a text."""
    texts: list[str]
    """The server's text for each token (llama_token_to_piece and the server's format)."""
    excluded: list[int]
    """Tokens that the server must never choose: EOS, and those that crash it."""

    def encode(self, text: str) -> list[int]:
        """Return ids without BOS."""
        ...


def tokenizer_of(file: GGUFFile) -> FileVocabulary:
    """Build the tokenizer of a file whose vocabulary `check_vocabulary` has passed."""
    return Bytes(file) if file.keys["tokenizer.ggml.model"] == "gpt2" else Pieces(file)


class Pieces:
    """Sentencepiece BPE, as in the engine's own tokenizer.

    It merges by best score, leftmost first, with byte fallback and one space put in front.
    """

    exact = True

    def __init__(self, file: GGUFFile) -> None:
        keys = file.keys
        self.bos: int | None = keys.get("tokenizer.ggml.bos_token_id", 1)
        self.excluded = [keys.get("tokenizer.ggml.eos_token_id", 2)]
        tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
        self.texts = [_piece_text(*pair) for pair in zip(tokens, types, strict=True)]
        model = proto.ModelProto()  # type: ignore[attr-defined]  # created at import
        for text, score, kind in zip(tokens, keys["tokenizer.ggml.scores"], types, strict=True):
            model.pieces.add(piece=text, score=score, type=kind)
        spec = model.trainer_spec
        spec.model_type, spec.byte_fallback = spec.BPE, True
        model.normalizer_spec.add_dummy_prefix = True
        model.normalizer_spec.remove_extra_whitespaces = False
        model.normalizer_spec.escape_whitespaces = True
        self._processor: Any = sentencepiece.SentencePieceProcessor(
            model_proto=model.SerializeToString()
        )

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text)
        return ids


def _piece_text(token: str, kind: int) -> str:
    if kind == NORMAL:
        return token.replace("\u2581", " ")
    if kind == BYTE:
        return _printed(bytes([int(token[3:5], 16)]))
    return "\u2585" if kind == UNKNOWN else ""


class Bytes:
    """GPT-2's byte-level BPE; user-defined tokens are found in the text first.

    The engine splits text by rules that differ from GPT-2's regular expression for several spaces
    before punctuation, and does not find user-defined tokens. Its server crashes when it chooses a
    token that is part of a character, and drops the probabilities of tokens without text.
    """

    exact = False

    def __init__(self, file: GGUFFile) -> None:
        keys = file.keys
        self.bos: int | None = None
        tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
        merges = [tuple(merge.split(" ")) for merge in keys["tokenizer.ggml.merges"]]
        self._tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
        self._tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=True)
        user = [t for t, kind in zip(tokens, types, strict=True) if kind == USER]
        self._tokenizer.add_tokens([AddedToken(text, normalized=False) for text in user])
        byte_of = {character: byte for byte, character in enumerate(alphabet())}
        raw = [
            bytes(byte_of[character] for character in token) if kind == NORMAL else b""
            for token, kind in zip(tokens, types, strict=True)
        ]
        self.texts = [_printed(text) for text in raw]
        partial = [i for i, text in enumerate(raw) if not text or not _whole(text)]
        self.excluded = sorted({keys["tokenizer.ggml.eos_token_id"], *partial})

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
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
