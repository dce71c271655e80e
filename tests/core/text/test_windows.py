"""Windows of long texts: no token is lost, doubled or moved to another split."""

from __future__ import annotations

import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sparsecast.core.text import windows as module
from sparsecast.core.text.corpus import LONG_FILE, PIECE, Document, read_documents
from sparsecast.core.text.splits import assign_splits
from sparsecast.core.text.tokens import (
    COUNTED,
    encode,
    encode_document,
    tokenize_documents,
)

SEQ_LEN = 32
DIGITS_AND_LINES = r"\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""Cut as by GPT-4: line ends stay together, a space goes with the word behind it."""


def byte_level(texts, *, cut: str | None) -> PreTrainedTokenizerFast:
    """A byte-level BPE, with GPT-2's cut or another one."""
    backend = Tokenizer(BPE())
    level = ByteLevel(add_prefix_space=False, use_regex=cut is None)
    backend.pre_tokenizer = (
        level if cut is None else Sequence([Split(Regex(cut), "isolated"), level])
    )
    backend.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=600,
        special_tokens=["<|begin|>"],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.fixture(scope="module")
def tokenizers(model_folder, corpus):
    texts = [path.read_text() for path in sorted(corpus.iterdir())][:20]
    gpt4 = byte_level(texts, cut=DIGITS_AND_LINES)
    gpt4.bos_token = "<|begin|>"
    return {
        "sentencepiece": AutoTokenizer.from_pretrained(model_folder),
        "gpt2": byte_level(texts, cut=None),
        "gpt4": gpt4,
    }


KINDS = ["sentencepiece", "gpt2", "gpt4"]
WORDS = [
    "def",
    "the",
    "value",
    "a",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "日本語",
    "🤖",
    "12345",
    "x" * 30,
    "<s>",
]
SAID = st.sampled_from([*WORDS, *(f" {word}" for word in WORDS)])
TEXTS = st.builds("".join, st.lists(SAID, max_size=20) | st.lists(SAID, min_size=60, max_size=150))


def rows_of(docs, tokenizer, quota, long_documents="split", seq_len=SEQ_LEN):
    return list(tokenize_documents(docs, tokenizer, quota, seq_len, long_documents=long_documents))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(text=TEXTS, seq_len=st.integers(2, 40), part=st.sampled_from([80, 200, 10_000]))
def test_windows_are_the_documents_ids_each_behind_one_bos(tokenizers, kind, text, seq_len, part):
    tokenizer = tokenizers[kind]
    bos = tokenizer.bos_token_id
    whole = encode(tokenizer, text, 10**9)
    ids = whole if bos is None else whole[1:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PART", part)
        patch.setattr(module, "LEAD", 40)
        rows = rows_of(
            [("train", Document("k", text))], tokenizer, {"train": 10**9}, "split", seq_len
        )
    room = seq_len - (bos is not None)
    want = [ids[i : i + room] for i in range(0, len(ids), room)]
    if bos is not None:
        want = [[bos, *window] for window in want]
        assert all(row.ids.count(bos) == 1 for row in rows)
    assert [row.ids for row in rows] == [window for window in want if len(window) > 1]
    assert [row.first for row in rows] == [i == 0 for i in range(len(rows))]
    assert [row.truncated for row in rows] == [i + 1 < len(want) for i in range(len(rows))]
    if rows:
        (cut,) = rows_of(
            [("train", Document("k", text))], tokenizer, {"train": 999}, "cut", seq_len
        )
        assert cut == rows[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unit", ["a", "ab", " ", "\n", "。", "\u0301", "日本語"])
def test_a_text_without_a_place_to_cut_loses_nothing(tokenizers, kind, unit, monkeypatch):
    monkeypatch.setattr(module, "PART", 200)
    monkeypatch.setattr(module, "LEAD", 50)
    tokenizer, text = tokenizers[kind], f"x{unit * 1000}x"
    rows = rows_of([("train", Document("k", text))], tokenizer, {"train": 10**9}, seq_len=10**6)
    got = tokenizer.decode(rows[0].ids, skip_special_tokens=True).replace(" ", "")
    assert got == text.replace(" ", "")


def test_the_tokenizer_never_sees_more_than_a_part(tokenizers, monkeypatch):
    monkeypatch.setattr(module, "PART", 5_000)
    tokenizer, longest = tokenizers["gpt2"], []
    plain = type(tokenizer).__call__

    def watched(self, text, **options):
        longest.append(len(text))
        return plain(self, text, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", watched)
    text = "some words and a line\n" * 5_000
    rows = rows_of([("train", Document("k", text))], tokenizer, {"train": 10**9})
    assert sum(len(row.ids) for row in rows) > 10_000
    assert max(longest) <= 5_000 + module.LEAD
    assert sum(longest) < 3 * len(text)
    longest.clear()
    rows_of([("train", Document("k", text))], tokenizer, {"train": 100})
    assert sum(longest) < 20_000  # a full quota ends the document


def test_a_long_chat_is_cut_and_not_tokenized_to_its_end(tokenizers, monkeypatch):
    tokenizer = tokenizers["sentencepiece"]
    tokenizer.chat_template = "{% for m in messages %}<s>[{{ m.role }}]{{ m.content }}{% endfor %}"
    chat = Document("k", "", (("user", "some words and more\n" * 200),))
    whole = encode_document(tokenizer, chat, 10**9)
    monkeypatch.setattr(module, "PART", 500)
    monkeypatch.setattr(module, "LEAD", 50)
    assert encode_document(tokenizer, chat, 10**9) == whole
    (row,) = rows_of([("train", chat)], tokenizer, {"train": 10**9})
    assert row.ids == whole[:SEQ_LEN]
    assert row.truncated
    huge = Document("k", "", (("user", "some words and more\n" * 200_000),))
    tracemalloc.start()
    encode_document(tokenizer, huge, SEQ_LEN)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 60_000_000  # a few copies of 4 MB; its ids alone would be 40 MB and more


def test_quotas_are_met_exactly_and_a_full_one_ends_the_document(tokenizers):
    tokenizer = tokenizers["sentencepiece"]
    book = "some words and a line\n" * 500
    docs = [(split, Document(split, book)) for split in ("held-out", "train", "calibration")] * 2
    quota = {"train": 100, "calibration": 65, "held-out": 40, COUNTED: 70}
    rows = rows_of(docs, tokenizer, quota)
    for split, wanted in quota.items():
        assert sum(len(row.ids) for row in rows if row.split == split) == wanted
    assert [row.split for row in rows] == [
        *["held-out"] * 2,
        *["train"] * 4,
        *[COUNTED] * 3,
        *["calibration"] * 3,
    ]
    assert [row.first for row in rows].count(True) == 3


def test_a_row_is_one_document_and_all_its_windows_are_in_its_split(tokenizers, tmp_path):
    tokenizer = tokenizers["gpt4"]
    path = tmp_path / "a.jsonl"
    books = [f"book {i} has a line {i * i}\n" * 700 for i in range(40)]
    assert len(books[0]) > 2 * PIECE
    path.write_text("".join(json.dumps({"text": book}) + "\n" for book in books))
    pieces = list(assign_splits(read_documents(str(path), seq_len=SEQ_LEN)))
    docs = list(assign_splits(read_documents(str(path), seq_len=SEQ_LEN, long_documents="split")))
    assert [doc.text for _, doc in docs] == [book.strip() for book in books]
    assert {doc.key: split for split, doc in docs} == {doc.key: split for split, doc in pieces}
    for split, doc in docs:
        rows = rows_of([(split, doc)], tokenizer, {split: 10**9})
        assert {row.split for row in rows} == {split}
        joined = [i for row in rows for i in row.ids[1:]]
        assert joined == encode(tokenizer, doc.text, 10**9)[1:]


def test_a_file_of_its_own_is_whole_and_a_long_one_streams(tmp_path):
    for i in range(25):
        (tmp_path / f"{i:02}.txt").write_text(f"file {i}\n" * 2_000)
    docs = list(read_documents(str(tmp_path), long_documents="split"))
    assert [doc.text for doc in docs] == [("f" + f"ile {i}\nf" * 2_000)[:-2] for i in range(25)]
    (tmp_path / "00.txt").write_text("file 0\n" * (2 * LONG_FILE // 7))
    stream = read_documents(str(tmp_path), long_documents="split")
    assert len(next(stream).text) <= PIECE
    alone = list(read_documents(str(tmp_path / "01.txt"), long_documents="split"))
    assert alone == list(read_documents(str(tmp_path / "01.txt")))
