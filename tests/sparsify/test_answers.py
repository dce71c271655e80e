"""What of a chat is learnt: the assistant's answers, found with the template's marks or without."""

from __future__ import annotations

from itertools import groupby

import pytest

from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.loading import load_tokenizer
from sparsecast.core.text.corpus import Document
from sparsecast.core.text.rows import UnusableRowError
from sparsecast.core.text.tokens import encode_document
from sparsecast.sparsify.answers import IGNORED, label_answers

PLAIN = (
    "{% for m in messages %}{{ m.role }}:\n{{ m.content }}"
    "{% if m.role == 'assistant' %}</s>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ m.role }}:\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{{ '\n' }}{% endfor %}"
)
LONG = "x = 1\n" * 20
CHATS = {
    "one answer": (("user", "What is f(x)?"), ("assistant", "It returns\nx + 1.")),
    "system": (("system", "Be short."), ("user", "Why?"), ("assistant", "def f(): pass")),
    "more turns": (
        ("user", "What?"),
        ("assistant", "def f(x): return 1"),
        ("user", "And then?"),
        ("assistant", "import os\n\nos.getcwd()"),
        ("user", "Thanks"),
    ),
    "no answer needed": (("user", "a"), ("assistant", "")),
}
SAID = {
    "one answer": ["It returns\nx + 1.</s>"],
    "system": ["def f(): pass</s>"],
    "more turns": ["def f(x): return 1</s>", "import os\n\nos.getcwd()</s>"],
    "no answer needed": ["</s>"],
}


@pytest.fixture
def tokenizer(model_folder):
    return load_tokenizer(Checkpoint(str(model_folder)))


def document(chat) -> Document:
    return Document("k", "\n".join(said for _, said in chat), chat, "chats.jsonl, line 1")


def answers(tokenizer, both) -> list[str]:
    """The texts of the runs of labelled tokens."""
    ids, labels = both.tolist()
    runs = groupby(range(len(ids)), key=lambda i: labels[i] != IGNORED)
    return [tokenizer.decode([ids[i] for i in places]) for labelled, places in runs if labelled]


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["plain", "marked"])
@pytest.mark.parametrize("name", CHATS)
def test_the_labels_are_the_answers(tokenizer, template, name):
    tokenizer.chat_template = template
    doc = document(CHATS[name])

    both = label_answers(tokenizer, doc, 512)

    assert both[0].tolist() == encode_document(tokenizer, doc, 512)
    assert all(label in (IGNORED, i) for i, label in zip(*both.tolist(), strict=True))
    assert answers(tokenizer, both) == SAID[name]


def test_without_a_special_token_at_its_end_an_answer_keeps_its_line_end(tokenizer):
    tokenizer.chat_template = PLAIN.replace("</s>", "")
    ids, labels = label_answers(tokenizer, document(CHATS["more turns"]), 512).tolist()

    ends = [i for i in range(len(ids) - 1) if labels[i] != IGNORED and labels[i + 1] == IGNORED]
    assert [tokenizer.decode([ids[i]]) for i in ends] == ["\n", "\n"]


@pytest.mark.parametrize("before", ["", "<s>", "<s><s>"])
def test_marks_stay_in_place_whatever_bos_the_template_writes(tokenizer, before):
    tokenizer.chat_template = before + MARKED

    both = label_answers(tokenizer, document(CHATS["system"]), 512)

    assert both[0].tolist().count(tokenizer.bos_token_id) == 1
    assert answers(tokenizer, both) == SAID["system"]


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["plain", "marked"])
def test_a_long_chat_is_cut_and_one_whose_answer_is_cut_off_is_refused(tokenizer, template):
    tokenizer.chat_template = template
    whole = label_answers(tokenizer, document(CHATS["more turns"]), 512)
    first = next(i for i, label in enumerate(whole[1].tolist()) if label != IGNORED)

    cut = label_answers(tokenizer, document(CHATS["more turns"]), first + 3)

    assert cut.tolist() == whole[:, : first + 3].tolist()
    with pytest.raises(UnusableRowError, match=f"without an answer in its first {first} tokens"):
        label_answers(tokenizer, document(CHATS["more turns"]), first)


def test_a_special_token_that_somebody_spells_out_stays_text(tokenizer):
    chat = (("user", "What is </s> for?"), ("assistant", "It ends <s> a text."))
    tokenizer.chat_template = PLAIN

    ids, labels = label_answers(tokenizer, document(chat), 512).tolist()

    assert ids.count(tokenizer.eos_token_id) == labels.count(tokenizer.eos_token_id) == 1
    tokenizer.chat_template = MARKED  # transformers would read it as the token
    with pytest.raises(UnusableRowError, match="spells out a special token"):
        label_answers(tokenizer, document(chat), 512)


THINKING = PLAIN.replace(
    "{{ m.content }}",
    "{% if loop.last and m.role == 'assistant' %}think\n{% endif %}{{ m.content }}",
)
"""As Qwen3 writes a thought into the last answer alone."""
LAST_ONLY = PLAIN.replace("{{ m.content }}", "{{ '' if loop.last else '!' }}{{ m.content }}")


def test_an_answer_that_is_written_differently_when_turns_follow_ends_with_its_token(tokenizer):
    tokenizer.chat_template = THINKING
    doc = document(CHATS["more turns"][:4])

    both = label_answers(tokenizer, doc, 512)

    assert answers(tokenizer, both) == [SAID["more turns"][0], "think\n" + SAID["more turns"][1]]
    first = next(i for i, label in enumerate(both[1].tolist()) if label != IGNORED)
    cut = label_answers(tokenizer, doc, first + 2)
    assert cut.tolist() == both[:, : first + 2].tolist()


MERGING = PLAIN.replace("assistant:\n", "assistant: ").replace("m.role }}:\n", "m.role }}: ")


@pytest.mark.parametrize(
    ("template", "chat", "why"),
    [
        (PLAIN, (("user", "a"), ("tool", "b")), "without a turn of the assistant"),
        (PLAIN, (("assistant", "I begin."), ("user", "So?")), "without an answer in its first"),
        (LAST_ONLY, CHATS["more turns"], "answer in turn 2 cannot be told apart"),
        (
            THINKING.replace("</s>", ""),
            CHATS["more turns"],
            "answer in turn 2 cannot be told apart",
        ),
        (MERGING, CHATS["system"], "answer in turn 3 cannot be told apart"),
        ("{{ raise_exception('no') }}", CHATS["system"], "the chat template refuses"),
    ],
)
def test_chats_whose_answers_cannot_be_told_apart_are_refused(tokenizer, template, chat, why):
    tokenizer.chat_template = template

    with pytest.raises(UnusableRowError, match=why):
        label_answers(tokenizer, document(chat), 512)


def test_a_text_is_no_chat(tokenizer):
    tokenizer.chat_template = PLAIN

    with pytest.raises(UnusableRowError, match="a text, expected a chat"):
        label_answers(tokenizer, Document("k", "x = 1"), 512)
