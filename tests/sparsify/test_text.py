"""What is trained on is encoded as what is evaluated on."""

from __future__ import annotations

import sys

import pytest
import torch

from sparsecast.core.errors import InputError
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.loading import load_tokenizer
from sparsecast.core.text.corpus import Document
from sparsecast.core.text.skipped import SkippedRows
from sparsecast.core.text.tokens import encode_document
from sparsecast.sparsify.sequences import pack_documents

CHAT = (("user", "What is <s> for?"), ("assistant", "It begins\na text."))
DOCS = [
    Document("a", "def f(x): return x </s> y"),
    Document("b", "What is <s> for?\nIt begins\na text.", CHAT),
    Document("c", "x = 1\n" * 40),
]


@pytest.fixture
def tokenizer(model_folder):
    made = load_tokenizer(Checkpoint(str(model_folder)))
    made.chat_template = (
        "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    )
    return made


def test_chats_go_through_the_template_and_texts_do_not(tokenizer):
    expected = [ids for doc in DOCS for ids in encode_document(tokenizer, doc, sys.maxsize)]

    rows = pack_documents(DOCS, tokenizer, seq_len=2, limit=10**6)

    kept = len(expected) - len(expected) % 2
    assert rows[:, 1].tolist() == expected[1:kept:2]
    assert set(rows[:, 0].tolist()) == {tokenizer.bos_token_id}
    assert rows.dtype == torch.int32


def test_chats_without_a_template_are_counted_and_alone_are_refused(tokenizer):
    tokenizer.chat_template = None
    texts = [doc for doc in DOCS if doc.chat is None]
    skipped = SkippedRows("a.jsonl", read=3)

    rows = pack_documents(DOCS, tokenizer, seq_len=2, limit=10**6, skipped=skipped)

    assert torch.equal(rows, pack_documents(texts, tokenizer, seq_len=2, limit=10**6))
    assert skipped.count == 1
    assert "no chat template" in skipped.first[0]
    with pytest.raises(InputError, match="a.jsonl: cannot use any .*no chat template"):
        pack_documents([DOCS[1]], tokenizer, seq_len=2, limit=10**6, skipped=skipped)


def test_a_limit_in_tokenizer_json_does_not_cut_the_corpus(tokenizer):
    whole = pack_documents(DOCS, tokenizer, seq_len=2, limit=10**6)
    tokenizer.backend_tokenizer.enable_truncation(8)
    tokenizer.backend_tokenizer.enable_padding(length=64)

    assert torch.equal(pack_documents(DOCS, tokenizer, seq_len=2, limit=10**6), whole)


def test_a_token_beyond_the_embedding_is_named(tokenizer):
    with pytest.raises(InputError, match=r"gives id \d+ .* embeddings for 300 ids alone"):
        pack_documents(DOCS, tokenizer, seq_len=2, limit=10**6, vocabulary=300)


def test_too_little_text_is_named(tokenizer):
    with pytest.raises(InputError, match="expected at least 4096"):
        pack_documents(DOCS, tokenizer, seq_len=4096, limit=10**6)
    with pytest.raises(InputError, match="has 0 tokens"):
        pack_documents([], tokenizer, seq_len=2, limit=10)
