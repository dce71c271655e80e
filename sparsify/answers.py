"""The tokens of a chat that the assistant says, which supervised fine-tuning learns.

Where the template marks them with `{% generation %}`, transformers tells which they are. Elsewhere
the turns before an answer, with the header that the template writes when the assistant is to
answer, must have the first ids of the whole chat: the answer follows. It ends where the turns up to
it end. Some templates, such as Qwen3's, write an answer differently when turns follow; then it
ends with the first special token. A chat in which neither holds is refused.
"""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparsecast.core.text.corpus import Document
from sparsecast.core.text.rows import UnusableRowError
from sparsecast.core.text.tokens import encode_document, with_bos

IGNORED = -100
"""Label of a token without loss."""
MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
ASSISTANT = "assistant"


def label_answers(tokenizer: Any, doc: Document, seq_len: int) -> Tensor:
    """Encode a chat and label the assistant's answers, their ends included.

    White space that a template writes behind the special token that ends an answer is no part of
    it, nor is an answer in front of which nothing stands.

    Args:
        tokenizer: One with a chat template.
        seq_len: The chat is cut after this many tokens.

    Returns:
        (2, n) int32: the ids, and the labels, each the id at the same place or `IGNORED`.

    Raises:
        UnusableRowError: No chat, no answer within `seq_len`, one that cannot be told apart, or a
            template that refuses the chat.
    """
    if doc.chat is None:
        raise UnusableRowError("a text, expected a chat under 'messages' or 'conversations'")
    if ASSISTANT not in (role for role, _ in doc.chat):
        raise UnusableRowError("a chat without a turn of the assistant")
    ids = encode_document(tokenizer, doc, sys.maxsize)
    if tokenizer.is_fast and MARKED.search(tokenizer.get_chat_template()):
        said = _marked(tokenizer, doc, ids)
    else:
        said = _between_prefixes(tokenizer, doc, ids, seq_len)
    both = torch.tensor([ids, ids], dtype=torch.int32)
    both[1][~torch.tensor(said)] = IGNORED
    both[1, 0] = IGNORED
    both = both[:, :seq_len].contiguous()
    if bool((both[1] == IGNORED).all()):
        raise UnusableRowError(f"a chat without an answer in its first {both.shape[1]} tokens")
    return both


def _marked(tokenizer: Any, doc: Document, ids: list[int]) -> list[bool]:
    """Return for each id whether the template marks it."""
    assert doc.chat is not None
    got = tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in doc.chat],
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    found = with_bos(tokenizer, got["input_ids"])
    if found != ids:
        raise UnusableRowError("a chat that spells out a special token")
    mask = [bool(place) for place in got["assistant_masks"]]
    surplus = len(mask) - len(found)  # BOS tokens of the template beyond one, or -1
    return [False] + mask if surplus < 0 else mask[surplus:]


def _between_prefixes(tokenizer: Any, doc: Document, ids: list[int], seq_len: int) -> list[bool]:
    """Return for each id whether it is of an answer that begins within `seq_len` tokens."""
    assert doc.chat is not None
    special = set(tokenizer.all_special_ids)
    said = [False] * len(ids)
    for turn, (role, _) in enumerate(doc.chat):
        if role != ASSISTANT or turn == 0:
            continue
        start = _length_of_prefix(tokenizer, doc, ids, turn, prompt=True)
        if start is not None and start >= seq_len:
            break
        stop = _length_of_prefix(tokenizer, doc, ids, turn + 1)
        ends = [i + 1 for i in range(start or 0, stop or len(ids)) if ids[i] in special]
        if start is None or (stop is None and not ends):
            raise UnusableRowError(
                f"a chat whose answer in turn {turn + 1} cannot be told apart: what the template "
                "writes alone for the turns up to there gets other tokens when more follows; mark "
                "answers in the template with {% generation %}"
            )
        if stop is None:
            stop = ends[0]
        elif ends and not "".join(tokenizer.decode(ids[ends[-1] : stop])).strip():
            stop = ends[-1]
        said[start:stop] = [True] * (stop - start)
    return said


def _length_of_prefix(
    tokenizer: Any, doc: Document, ids: list[int], turns: int, prompt: bool = False
) -> int | None:
    """Return how many of `ids` the first turns of a chat are; None: they are other ids."""
    assert doc.chat is not None
    prefix = replace(doc, chat=doc.chat[:turns])
    found = encode_document(tokenizer, prefix, sys.maxsize, prompt=prompt)
    return len(found) if found == ids[: len(found)] else None
