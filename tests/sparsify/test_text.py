"""What is trained on is encoded as what is evaluated on."""

from __future__ import annotations

import sys
from itertools import islice

import numpy as np
import pytest
import torch

from sparsecast.core.errors import InputError
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.loading import load_tokenizer
from sparsecast.core.text.corpus import Document
from sparsecast.core.text.skipped import SkippedRows
from sparsecast.core.text.tokens import encode_document
from sparsecast.sparsify import sequences
from sparsecast.sparsify.sequences import Batches, open_rows, pack_documents, rows_file

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


@pytest.fixture
def pack(tmp_path):
    """(documents, tokenizer) to training sequences of two tokens."""

    def make(docs, tokenizer, seq_len=2, limit=10**6, vocabulary=512, skipped=None):
        path = rows_file(tmp_path, vocabulary)
        pack_documents(docs, tokenizer, path, seq_len, limit, vocabulary, skipped)
        return open_rows(path, seq_len)

    return make


def test_chats_go_through_the_template_and_texts_do_not(tokenizer, pack):
    expected = [ids for doc in DOCS for ids in encode_document(tokenizer, doc, sys.maxsize)]

    rows = pack(DOCS, tokenizer)

    kept = len(expected) - len(expected) % 2
    assert rows[:, 1].tolist() == expected[1:kept:2]
    assert set(rows[:, 0].tolist()) == {tokenizer.bos_token_id}
    assert rows.dtype == np.uint16


def test_chats_without_a_template_are_counted_and_alone_are_refused(tokenizer, pack):
    tokenizer.chat_template = None
    texts = [doc for doc in DOCS if doc.chat is None]
    skipped = SkippedRows("a.jsonl", read=3)

    rows = pack(DOCS, tokenizer, skipped=skipped)

    assert np.array_equal(rows, pack(texts, tokenizer))
    assert skipped.count == 1
    assert "no chat template" in skipped.first[0]
    with pytest.raises(InputError, match="a.jsonl: cannot use any .*no chat template"):
        pack([DOCS[1]], tokenizer, skipped=skipped)


def test_a_limit_in_tokenizer_json_does_not_cut_the_corpus(tokenizer, pack):
    whole = pack(DOCS, tokenizer)
    tokenizer.backend_tokenizer.enable_truncation(8)
    tokenizer.backend_tokenizer.enable_padding(length=64)

    assert np.array_equal(pack(DOCS, tokenizer), whole)


def test_a_token_beyond_the_embedding_is_named(tokenizer, pack):
    with pytest.raises(InputError, match=r"gives id \d+ .* embeddings for 300 ids alone"):
        pack(DOCS, tokenizer, vocabulary=300)


def test_too_little_text_is_named(tokenizer, pack):
    with pytest.raises(InputError, match="expected at least 4096"):
        pack(DOCS, tokenizer, seq_len=4096)
    with pytest.raises(InputError, match="has 0 tokens"):
        pack([], tokenizer)


@pytest.mark.parametrize("seq_len", [3, 7])
@pytest.mark.parametrize("vocabulary", [1 << 16, (1 << 16) + 1])
def test_groups_of_documents_are_written_as_one_text(
    tokenizer, pack, seq_len, vocabulary, monkeypatch
):
    monkeypatch.setattr(sequences, "GROUP", 2)
    docs = [Document(str(i), f"x{i} = {i}\n" * (i % 4)) for i in range(23)]
    flat = torch.tensor([i for doc in docs for i in encode_document(tokenizer, doc, sys.maxsize)])
    meant = flat[: len(flat) - len(flat) % seq_len].view(-1, seq_len).clone()
    meant[:, 0] = tokenizer.bos_token_id

    rows = pack(docs, tokenizer, seq_len, vocabulary=vocabulary)

    assert np.array_equal(rows, meant)
    assert rows.itemsize == (2 if vocabulary == 1 << 16 else 4)


def test_reading_stops_behind_the_group_that_reaches_the_limit(tokenizer, pack, monkeypatch):
    monkeypatch.setattr(sequences, "GROUP", 1)

    rows = pack(DOCS, tokenizer, limit=1)

    assert np.array_equal(rows, pack(DOCS[:1], tokenizer))


def test_a_file_that_is_not_complete_has_no_name(tokenizer, pack, tmp_path, monkeypatch):
    monkeypatch.setattr(sequences, "GROUP", 1)

    def docs():
        yield from DOCS
        assert [path.name for path in tmp_path.iterdir()] == [".tokens.uint16.part"]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(docs(), tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_every_epoch_draws_all_rows_once_and_a_later_start_goes_on(tokenizer, pack, tmp_path):
    rows = pack(DOCS, tokenizer, seq_len=9)
    steps, path = len(rows), rows_file(tmp_path, 512)

    batches = list(islice(Batches(path, 9, 2, seed=5), 2 * steps))
    later = next(iter(Batches(path, 9, 2, seed=5, first=steps + 1)))

    drawn = torch.cat(batches).view(4, len(rows), 9)
    for epoch in drawn:
        assert sorted(epoch.tolist()) == sorted(rows.tolist())
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(later, batches[steps + 1])


def test_processes_share_the_batches_of_one(tokenizer, pack, tmp_path):
    pack(DOCS, tokenizer, seq_len=9)
    path = rows_file(tmp_path, 512)
    whole = list(islice(Batches(path, 9, 6, seed=5), 4))
    parts = [Batches(path, 9, 6, seed=5) for _ in range(3)]
    for rank, part in enumerate(parts):
        part.take_part(rank, 3)

    shares = zip(*(islice(part, 4) for part in parts), strict=True)

    assert all(torch.equal(torch.cat(s), w) for s, w in zip(shares, whole, strict=True))
