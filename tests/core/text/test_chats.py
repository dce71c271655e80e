"""Chats and standard input: the template is the tokenizer's, and BOS stands once in front."""

from __future__ import annotations

import io
import json

import pytest
from transformers import AutoTokenizer

from sparsecast.core.errors import InputError
from sparsecast.core.text.corpus import PIECE, Document, read_documents
from sparsecast.core.text.skipped import SkippedRows
from sparsecast.core.text.tokens import (
    Sequence,
    batch_by_length,
    encode,
    encode_document,
    tokenize_documents,
)

TURNS = [("user", "What is 1+1?"), ("assistant", "2")]
CHATML = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"


@pytest.fixture
def tokenizer(model_folder):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.mark.parametrize("prefix", ["", "<s>", "<s><s>"])
def test_bos_stands_once_whatever_the_template_writes(tokenizer, prefix):
    tokenizer.chat_template = prefix + CHATML
    chat = Document("k", "", tuple(TURNS))
    ids = encode_document(tokenizer, chat, 1000)
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(ids[1:]) == "<|user|>What is 1+1?\n<|assistant|>2\n"
    assert encode_document(tokenizer, chat, 5) == ids[:5]


def test_a_special_token_that_somebody_spells_out_is_text(tokenizer):
    tokenizer.chat_template = "<s>" + CHATML + "</s>"
    said = "a <s> b </s></s>"
    ids = encode_document(tokenizer, Document("k", said, (("user", said),)), 1000)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert [place for place, i in enumerate(ids) if i in (bos, eos)] == [0, len(ids) - 1]
    assert "".join(tokenizer.decode(ids[1:-1]).split()) == "<|user|>a<s>b</s></s>"


def test_a_special_token_as_a_role_is_text(tokenizer):
    tokenizer.chat_template = "<s>" + CHATML
    ids = encode_document(tokenizer, Document("k", "a", (("</s>", "a"), ("<s>", "b"))), 1000)
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.eos_token_id not in ids
    assert "".join(tokenizer.decode(ids[1:]).split()) == "<|</s>|>a<|<s>|>b"


def test_a_chat_that_cannot_be_rendered_is_refused(tokenizer, model_folder):
    chat = Document("k", "hello", (("user", "hello"),))
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InputError, match="refuses the chat that begins 'hello' .*alternate"):
        encode_document(tokenizer, chat, 10)
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        encode_document(tokenizer, chat, 10)


def test_a_chat_that_the_template_refuses_is_counted_and_named(tokenizer):
    tokenizer.chat_template = (
        "{% if messages[0].role != 'user' %}{{ raise_exception('begin with user') }}{% endif %}"
        + CHATML
    )
    docs = [
        ("train", Document("a", "x", (("assistant", "x"),), "a.jsonl:1")),
        ("train", Document("b", "hello", (("user", "hello"),), "a.jsonl:2")),
    ]
    skipped = SkippedRows("a.jsonl", read=2)
    (row,) = tokenize_documents(docs, tokenizer, {"train": 99}, 99, skipped=skipped)
    assert tokenizer.decode(row.ids[1:]) == "<|user|>hello\n"
    assert skipped.count == 1
    assert skipped.first[0].startswith("a.jsonl:1: the chat template refuses")
    assert "begin with user" in skipped.first[0]


@pytest.mark.parametrize("template", [None, "{{ raise_exception('no') }}"])
def test_chats_that_are_all_refused_end_the_run(tokenizer, template, monkeypatch):
    tokenizer.chat_template = template
    monkeypatch.setattr("sparsecast.core.text.tokens.GIVE_UP", 10)
    read = []

    def chats(number):
        for i in range(number):
            read.append(i)
            yield "train", Document(str(i), "hello", (("user", "hello"),), f"c:{i}")

    for number in (3, 1_000):
        skipped = SkippedRows("c", read=number)
        rows = tokenize_documents(chats(number), tokenizer, {"train": 99}, 99, skipped=skipped)
        why = "no chat template" if template is None else "refuses the chat"
        with pytest.raises(InputError, match=rf"c: cannot use any of its first .*c:0: .*{why}"):
            list(rows)
    assert len(read) == 13


def test_texts_among_chats_need_no_template(tokenizer):
    tokenizer.chat_template = None
    docs = [
        ("train", Document("a", "hello", (("user", "hello"),), "a:1")),
        ("train", Document("b", "some text")),
    ]
    skipped = SkippedRows("a", read=2)
    (row,) = tokenize_documents(docs, tokenizer, {"train": 99}, 99, skipped=skipped)
    assert row.ids == encode(tokenizer, "some text", 99)
    assert skipped.count == 1


def test_standard_input_is_text_or_json_lines(monkeypatch):
    text = "".join(f"line {i}\n" for i in range(3000))
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    docs = list(read_documents("-"))
    assert len(docs) > 3
    assert all(len(doc.text) <= PIECE + 20 for doc in docs)
    assert "".join(doc.text + "\n" for doc in docs) == text
    rows = [{"text": "a b"}, {"messages": [{"role": "user", "content": "c"}]}]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(map(json.dumps, rows))))
    plain, chat = read_documents("-")
    assert plain.text == "a b"
    assert chat.chat == (("user", "c"),)
    marked = io.TextIOWrapper(io.BytesIO(b'\xef\xbb\xbf{"text": "a b"}'), "ascii")
    monkeypatch.setattr("sys.stdin", marked)
    assert [doc.text for doc in read_documents("-")] == ["a b"]
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(InputError, match="standard input is closed"):
        list(read_documents("-"))
    monkeypatch.setattr("sys.stdin", io.StringIO("\n \n"))
    with pytest.raises(InputError, match="no text in this corpus"):
        list(read_documents("-"))


def test_batches_hold_sequences_of_like_length_and_every_one_once(tokenizer):
    lengths = [2 + (i * 37) % 60 for i in range(300)]
    rows = [Sequence("train", [i] * n, truncated=False) for i, n in enumerate(lengths)]
    batches = list(batch_by_length(rows, seq_len=64, batch_size=4))
    seen = sorted(
        (int(ids[0]), int(keep.sum()))
        for batch in batches
        for ids, keep in zip(batch.ids_BS, batch.keep_BS, strict=True)
    )
    assert seen == list(enumerate(lengths))
    assert all(batch.ids_BS.numel() <= 4 * 64 for batch in batches)
    padded = sum(batch.ids_BS.numel() for batch in batches)
    assert padded < 1.15 * sum(lengths)


def test_documents_of_one_token_are_dropped_and_long_ones_say_so(tokenizer):
    docs = [("train", Document("a", "x" * 4000)), ("train", Document("b", ""))]
    (row,) = tokenize_documents(docs, tokenizer, {"train": 1_000}, seq_len=32)
    assert len(row.ids) == 32
    assert row.truncated
