"""Continue the beginnings of held-out documents, for the model card.

A prompt is where a text begins, in whole words; of a chat, the turns up to the user's first one,
through the tokenizer's template.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from sparsecast.core.text.corpus import Document
from sparsecast.core.text.tokens import encode, with_bos

PROMPTS = 3
PROMPT_CHARACTERS = 300
USEFUL = 80
"""Characters of a text's prompt below which others are preferred."""
OPENINGS = 64
"""Held-out documents that prompts are taken from."""
SAMPLE_TOKENS = 120


class Prompt(NamedTuple):
    text: str
    """As the card shows it: of a chat, what the user says."""
    ids: list[int]
    chat: bool = False


class Sample(NamedTuple):
    prompt: str
    text: str
    """The model's continuation."""
    chat: bool = False


def keep_openings(
    docs: Iterable[tuple[str, Document]], kept: list[Document]
) -> Iterator[tuple[str, Document]]:
    """Pass (split, document) pairs on; `kept` gets the beginnings of the first held-out ones."""
    for split, doc in docs:
        if split == "held-out" and len(kept) < OPENINGS:
            kept.append(replace(doc, text=doc.text[: 2 * PROMPT_CHARACTERS]))
        yield split, doc


def choose_prompts(docs: Sequence[Document], tokenizer: Tokenizer, most: int) -> list[Prompt]:
    """Return the first `PROMPTS` prompts of at most `most` tokens; short ones of texts come last.

    A chat that the template refuses, or whose first turns are longer, gives none.
    """
    found = [prompt for doc in docs if (prompt := _prompt(doc, tokenizer, most)) is not None]
    found.sort(key=lambda prompt: not prompt.chat and len(prompt.text) < USEFUL)
    return found[:PROMPTS]


def opening(text: str, most: int) -> str:
    """Return the beginning of a text: at most `most` characters, and half of the text.

    It ends with a line if one ends in the second half of that, else with a word. Text without any
    white space there is cut between characters.
    """
    text = text.strip()
    most = min(most, len(text) // 2)
    head = text[: most + 1]  # with the character behind it
    end = head.rfind("\n", most // 2)
    if end < 0:
        end = max((place for place, sign in enumerate(head) if sign.isspace()), default=most)
    return head[:end].rstrip()


def _prompt(doc: Document, tokenizer: Tokenizer, most: int) -> Prompt | None:
    if doc.chat is not None:
        return _chat_prompt(doc.chat, tokenizer, most)
    characters = PROMPT_CHARACTERS
    while text := opening(doc.text, characters):
        ids = encode(tokenizer, text, sys.maxsize)
        if len(ids) <= most:
            return Prompt(text, ids)
        characters = min(characters - 1, characters * most // len(ids))
    return None


def _chat_prompt(chat: Sequence[tuple[str, str]], tokenizer: Tokenizer, most: int) -> Prompt | None:
    place = next((i for i, (role, said) in enumerate(chat) if role == "user" and said.strip()), -1)
    turns = [{"role": role, "content": said} for role, said in chat[: place + 1]]
    written = "\n".join(turn["content"] for turn in turns)
    if not turns or any(special in written for special in tokenizer.all_special_tokens):
        return None
    template: Any = tokenizer.apply_chat_template
    try:
        text = str(template(turns, tokenize=False, add_generation_prompt=True))
    except Exception:  # a template raises what it likes
        return None
    ids = with_bos(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])
    return Prompt(turns[-1]["content"], ids, chat=True) if len(ids) <= most else None


def continue_prompts(
    model: Any, tokenizer: Tokenizer, prompts: Sequence[Prompt], longest: int, seed: int
) -> list[Sample]:
    """Let the model continue prompts, to at most `longest` tokens with the prompt."""
    samples = []
    for prompt in prompts:
        length = min(SAMPLE_TOKENS, longest - len(prompt.ids))
        torch.manual_seed(seed)
        text = _continue(model, tokenizer, prompt.ids, length)
        samples.append(Sample(prompt.text, text, prompt.chat))
    return samples


def _continue(model: Any, tokenizer: Tokenizer, ids: list[int], length: int) -> str:
    config = model.config
    generation: Any = GenerationConfig
    options = generation(
        max_new_tokens=length,
        do_sample=True,
        temperature=0.7,
        top_k=40,
        top_p=1.0,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.eos_token_id if isinstance(config.eos_token_id, int) else 0,
    )
    ids_BS = torch.tensor([ids], device=model.device)
    out_BS = model.generate(
        ids_BS, generation_config=options, attention_mask=torch.ones_like(ids_BS)
    )
    return "".join(tokenizer.decode(out_BS[0, len(ids) :], skip_special_tokens=True))
