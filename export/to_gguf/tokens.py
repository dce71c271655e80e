"""llama.cpp's tokenizer of a model: its keys, and where it differs from the model's own.

Sentencepiece BPE is the same in llama.cpp as in PowerInfer's engine. Byte-level BPE splits text by
the rules that `tokenizer.ggml.pre` names; a file cannot give them otherwise, so a tokenizer.json
has to spell one of `RULES` exactly. llama.cpp normalizes nothing. (llama.cpp b11434,
src/llama-vocab.cpp: `llama_vocab::impl::load`, `llm_tokenizer_bpe`.)
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from sparsecast.core.errors import InputError
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.export.read.other_tokens import Encode, OtherTokens
from sparsecast.export.write.consent import check_other_tokens
from sparsecast.export.write.vocab import Vocabulary, listed, steps_of
from sparsecast.export.write.vocab_reader import read_tokens, tokenizer_spec

ALONE = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
"""GPT-2's own expression."""
BEHIND = ALONE | {"use_regex": False}


def _split(pattern: str) -> list[dict[str, Any]]:
    found = {"Regex": pattern}
    return [{"type": "Split", "pattern": found, "behavior": "Isolated", "invert": False}, BEHIND]


_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3, _QWEN2 = _split(_WORDS % "{1,3}"), _split(_WORDS % "")


class Rules(NamedTuple):
    """How llama.cpp splits a text under one name."""

    pre: str
    """tokenizer.ggml.pre."""
    steps: list[dict[str, Any]]
    """The same as steps of a tokenizer.json."""
    ignore_merges: bool = False
    """Whether it takes a word whole where it is a token."""


RULES = (
    Rules("gpt-2", [ALONE]),
    Rules("smollm", [{"type": "Digits", "individual_digits": True}, ALONE]),
    Rules("llama-bpe", _LLAMA3, True),
    Rules("smaug-bpe", _LLAMA3),
    Rules("qwen2", _QWEN2),
)


class LlamaCppTokens(NamedTuple):
    """A file's tokenizer."""

    vocabulary: Vocabulary
    pre: str
    """tokenizer.ggml.pre."""
    add_bos: bool
    """tokenizer.ggml.add_bos_token."""
    chat_template: str | None
    """tokenizer.chat_template."""
    other: OtherTokens | None
    """Of how much text llama.cpp makes other tokens; None where it is none."""


def read_llama_cpp_tokens(checkpoint: Checkpoint, size: int, *, allowed: bool) -> LlamaCppTokens:
    """Read a checkpoint's tokenizer for a file with `size` rows of the embedding.

    Args:
        allowed: Accept a tokenizer that llama.cpp does not have.

    Raises:
        InputError: See `read_vocabulary` and `check_other_tokens`.
    """
    vocabulary, tokenizer = read_tokens(checkpoint, size)
    template = tokenizer.chat_template
    chat = template if isinstance(template, str) else None
    if vocabulary.model == "llama":
        other = check_other_tokens(checkpoint, vocabulary, allowed=allowed, engine="llama.cpp")
        return LlamaCppTokens(vocabulary, "default", True, chat, other)
    _, spec = tokenizer_spec(checkpoint.folder, tokenizer)
    rules, differences = matching_rules(spec)
    vocabulary = vocabulary._replace(notes=[], differences=differences)
    other = check_other_tokens(
        checkpoint,
        vocabulary,
        allowed=allowed,
        engine="llama.cpp",
        encode=llama_cpp_encode(spec, rules),
    )
    add_bos = tokenizer.bos_token_id in tokenizer("")["input_ids"]
    return LlamaCppTokens(vocabulary, rules.pre, add_bos, chat, other)


def matching_rules(spec: dict[str, Any]) -> tuple[Rules, list[str]]:
    """Choose the rules that split as this tokenizer.json says, and say what differs.

    Without any that do, they are GPT-2's.
    """
    differences = []
    if normalizers := steps_of(spec, "normalizer"):
        differences.append(f"normalizes text ({', '.join(step['type'] for step in normalizers)})")
    wanted = [_spelled(step) for step in steps_of(spec, "pre_tokenizer")]
    whole = bool(spec["model"]["ignore_merges"])
    alike = [rules for rules in RULES if [_spelled(step) for step in rules.steps] == wanted]
    if not alike:
        differences.append(f"splits text by {listed(steps_of(spec, 'pre_tokenizer'))}")
        alike = [RULES[0]]
    rules = next((rules for rules in alike if rules.ignore_merges == whole), alike[0])
    if rules.ignore_merges != whole:
        differences.append("takes a word whole where it is a token (ignore_merges)")
    return rules, differences


def _spelled(step: dict[str, Any]) -> dict[str, Any]:
    """Drop what does not change where text is split."""
    return {key: value for key, value in step.items() if key != "trim_offsets"}


def llama_cpp_encode(spec: dict[str, Any], rules: Rules) -> Encode:
    """Return llama.cpp's ids of a text, without BOS: the same merges behind its own rules.

    A special token spelled in the text is text, other added tokens are found in it.
    """
    own = spec | {"normalizer": None, "post_processor": None, "padding": None, "truncation": None}
    own["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [_full(s) for s in rules.steps]}
    own["added_tokens"] = [token for token in spec["added_tokens"] if not token["special"]]
    own["model"] = spec["model"] | {"ignore_merges": rules.ignore_merges}
    try:
        tokenizer = Tokenizer.from_str(json.dumps(own))
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"the tokenizer cannot be built with llama.cpp's rules: {error}") from None

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    return encode


def _full(step: dict[str, Any]) -> dict[str, Any]:
    return step | {"trim_offsets": True} if step["type"] == "ByteLevel" else step
