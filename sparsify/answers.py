"""The tokens of a chat that the assistant says, which supervised fine-tuning learns.

Where the template marks them with `{% generation %}`, transformers tells which they are. Elsewhere
an answer is what the whole chat has between two prefixes of it: the turns before, with the header
that the template writes when the assistant is to answer, and the turns up to the answer. A chat in
which the ids of a prefix are not the first ids of the whole is refused: some templates write a turn
differently when others follow.
"""

from __future__ import annotations

import re
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
    ids = encode_document(tokenizer, doc, seq_len)
    marked = tokenizer.is_fast and MARKED.search(tokenizer.get_chat_template())
    said = _marked(tokenizer, doc, ids) if marked else _between_prefixes(tokenizer, doc, ids)
    both = torch.tensor([ids, ids], dtype=torch.int32)
    both[1][~torch.tensor(said)] = IGNORED
    both[1, 0] = IGNORED
    if bool((both[1] == IGNORED).all()):
        raise UnusableRowError(f"a chat without an answer in its first {len(ids)} tokens")
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
    if found[: len(ids)] != ids:
        raise UnusableRowError("a chat that spells out a special token")
    mask = [bool(place) for place in got["assistant_masks"]]
    surplus = len(mask) - len(found)  # BOS tokens of the template beyond one, or -1
    return ([False] + mask if surplus < 0 else mask[surplus:])[: len(ids)]


def _between_prefixes(tokenizer: Any, doc: Document, ids: list[int]) -> list[bool]:
    assert doc.chat is not None
    special = set(tokenizer.all_special_ids)
    said = [False] * len(ids)
    for turn, (role, _) in enumerate(doc.chat):
        if role != ASSISTANT or turn == 0:
            continue
        start = _length_of_prefix(tokenizer, doc, ids, turn, prompt=True)
        stop = _length_of_prefix(tokenizer, doc, ids, turn + 1)
        end = next((i for i in range(stop, start, -1) if ids[i - 1] in special), stop)
        if not "".join(tokenizer.decode(ids[end:stop])).strip():
            stop = end
        said[start:stop] = [True] * (stop - start)
    return said


def _length_of_prefix(
    tokenizer: Any, doc: Document, ids: list[int], turns: int, prompt: bool = False
) -> int:
    """Return how many of `ids` the first turns of a chat are."""
    assert doc.chat is not None
    prefix = replace(doc, chat=doc.chat[:turns])
    found = encode_document(tokenizer, prefix, len(ids), prompt=prompt)
    if found != ids[: len(found)]:
        raise UnusableRowError(
            f"a chat whose beginning, {turns} of its turns, gets other tokens when more follows: "
            "its answers cannot be told apart; mark them in the template with {% generation %}"
        )
    return len(found)
