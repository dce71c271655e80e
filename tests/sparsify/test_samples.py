"""Prompts begin where documents begin and end with a word; chats are asked as their users did."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.loading import load_tokenizer
from sparsecast.core.text.corpus import Document
from sparsecast.sparsify.run import sparsify
from sparsecast.sparsify.samples import choose_prompts, keep_openings, opening

TEMPLATE = (
    "{% for m in messages %}<s>[{{ m['role'] }}] {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>[assistant] {% endif %}"
)
WORDS = "alpha beta gamma delta "


@pytest.fixture
def tokenizer(model_folder):
    made = load_tokenizer(Checkpoint(str(model_folder)))
    made.chat_template = TEMPLATE
    return made


@given(st.text(st.sampled_from("ab \n\té"), min_size=1), st.integers(1, 40))
def test_an_opening_is_a_beginning_in_whole_words(text, most):
    whole = text.strip()

    found = opening(text, most)

    assert whole.startswith(found)
    assert found == found.strip()
    assert len(found) <= min(most, len(whole) // 2)
    if re.search(r"\s", whole[: min(most, len(whole) // 2) + 1]):
        assert found
        assert whole[len(found)].isspace()


def test_an_opening_ends_with_a_line_where_one_ends_late_enough():
    text = "one two\nthree four\nfive six seven eight nine ten"

    assert opening(text, 22) == "one two\nthree four"
    assert opening(text, 15) == "one two"
    assert opening(text, 17) == "one two\nthree"  # the line ends in the first half
    assert opening("日本語の文章です", 3) == "日本語"


def test_prompts_fit_and_short_ones_come_last(tokenizer):
    docs = [Document("a", "tiny text"), *(Document(str(i), WORDS * 40) for i in range(2))]
    docs.append(Document("b", "x"))

    wide = choose_prompts(docs, tokenizer, 10_000)
    narrow = choose_prompts(docs, tokenizer, 12)

    assert [len(prompt.text) > 250 for prompt in wide] == [True, True, False]
    assert wide[2].text == "tiny"
    for prompt in narrow:
        assert len(prompt.ids) <= 12
        assert prompt.ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(prompt.ids, skip_special_tokens=True).strip() == prompt.text
    assert max(len(prompt.text.split()) for prompt in narrow) > 1


CHAT = (("system", "Be brief."), ("user", "Why?"), ("assistant", "So."), ("user", "And?"))


def test_a_chat_is_asked_what_its_user_asked_first(tokenizer):
    (prompt,) = choose_prompts([Document("a", "", CHAT)], tokenizer, 100)

    text = "[system] Be brief.</s><s>[user] Why?</s><s>[assistant] "
    assert prompt.ids == tokenizer(f"<s>{text}", add_special_tokens=False)["input_ids"]
    assert (prompt.text, prompt.chat) == ("Why?", True)


@pytest.mark.parametrize(
    "chat",
    [
        (("assistant", "Hello."),),
        (("user", "Is </s> the end?"),),
        (("user", "long " * 100),),
    ],
    ids=["no user", "a special token in words", "too long"],
)
def test_chats_that_cannot_be_asked_give_no_prompt(tokenizer, chat):
    assert choose_prompts([Document("a", "", chat)], tokenizer, 60) == []


def test_a_chat_without_a_template_or_one_that_it_refuses_gives_none(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('roles') }}"
    assert choose_prompts([Document("a", "", CHAT)], tokenizer, 100) == []
    tokenizer.chat_template = None
    assert choose_prompts([Document("a", "", CHAT)], tokenizer, 100) == []


def test_held_out_documents_alone_are_kept_and_all_are_passed_on():
    docs = [("train", Document("a", "x")), ("held-out", Document("b", WORDS * 1000))]
    kept = []

    assert list(keep_openings(docs, kept)) == docs

    assert [doc.key for doc in kept] == ["b"]
    assert len(kept[0].text) < 1000


def fences(card):
    return re.findall(r"```text\n(.*?)\n```", card.partition("## Samples")[2], re.DOTALL)


def test_the_card_shows_beginnings_of_documents(dense, options, short_corpus):
    out = sparsify(options(model=str(dense()), seq_len=64, tokens=64))

    prompts = fences((out / "README.md").read_text())[::2]
    texts = [path.read_text().strip() for path in short_corpus.iterdir()]
    assert prompts
    for prompt in prompts:
        (whole,) = {text for text in texts if prompt in text}
        assert whole[whole.index(prompt) + len(prompt)].isspace()


def test_the_card_shows_what_the_user_says(dense, options, tmp_path):
    source, chats = dense(), tmp_path / "chats.jsonl"
    (source / "chat_template.jinja").write_text(TEMPLATE)
    turns = [{"role": "user", "content": "Explain"}, {"role": "assistant", "content": "Well, no."}]
    rows = ({"messages": [{**turns[0], "content": f"Explain {i}"}, turns[1]]} for i in range(60))
    chats.write_text("".join(json.dumps(row) + "\n" for row in rows))

    out = sparsify(options(model=str(source), corpus=str(chats), seq_len=64, tokens=64))

    card = (out / "README.md").read_text()
    assert card.count("What the user says in a held-out chat:") == 3
    assert card.count("and how the model answers:") == 3
    assert all(re.fullmatch(r"Explain \d+", prompt) for prompt in fences(card)[::2])
