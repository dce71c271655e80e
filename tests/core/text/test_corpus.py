"""Corpora, splits and token batches."""

from __future__ import annotations

import json
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sentencepiece
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from sparsecast.core.errors import InputError
from sparsecast.core.text.corpus import PIECE, Document, read_documents, split_text
from sparsecast.core.text.splits import SPLITS, assign_splits, split_of
from sparsecast.core.text.tokens import encode, split_quotas, token_batches


@given(st.text(alphabet="ab \n", max_size=4 * PIECE), st.integers(1, 3 * PIECE))
def test_pieces_lose_nothing_but_space(text, block):
    cut = list(split_text([text]))
    assert cut == list(split_text(text[i : i + block] for i in range(0, len(text), block)))
    assert "".join("".join(cut).split()) == "".join(text.split())
    assert all(0 < len(piece) <= PIECE for piece in cut)


def test_builtin_is_the_same_twice_and_with_workers():
    first = list(islice(read_documents("builtin"), 80))
    assert first == list(islice(read_documents("builtin"), 80))
    assert first == list(islice(read_documents("builtin", workers=2), 80))


def test_prose_and_source_of_a_file_share_a_split():
    docs = list(islice(assign_splits(read_documents("builtin")), 400))
    splits = {}
    for split, doc in docs:
        assert splits.setdefault(doc.key, split) == split
    assert len(splits) < len(docs)


def test_every_kind_of_file(tmp_path):
    (tmp_path / "a.txt").write_text("text one\n")
    (tmp_path / "b.jsonl").write_text('{"text": "json one"}\n\n{"text": "json two"}\n')
    pq.write_table(pa.table({"text": ["parquet one"]}), tmp_path / "c.parquet")
    (tmp_path / "d.bin").write_text("not text")
    want = ["text one", "json one", "json two", "parquet one"]
    assert [doc.text for doc in read_documents(str(tmp_path))] == want
    assert [doc.text for doc in read_documents(str(tmp_path / "*.jsonl"))] == want[1:3]


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.jsonl", '{"text": 1}', r"a\.jsonl:1: expected a string under 'text'"),
        ("a.jsonl", "{\n{\n", r"a\.jsonl:1: not JSON"),
        ("a.jsonl", '[{"text": "x"}]', r"a\.jsonl:1: is no JSON object but list; expected one"),
        ("a.jsonl", '5\n"x"\n', r"a\.jsonl:1: is no JSON object but int"),
        ("a.txt", " \n", "no text in this corpus"),
        ("a.bin", "x", "cannot read this type"),
        ("a.txt", "x\0y", r"a\.txt: holds NUL bytes"),
        ("a.jsonl", "[" * 100_000, r"a\.jsonl:1: not JSON"),
        ("a.jsonl", '{"text": ' + "9" * 5000 + "}", r"a\.jsonl:1: not JSON"),
        ("a.jsonl", '{"text": null}', r"a\.jsonl:1: .*found text \(NoneType\)"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, match):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=match):
        list(read_documents(str(tmp_path / name)))


def test_a_byte_order_mark_and_a_lone_surrogate_are_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "two \\ud800 \\ud83e\\udd16"}')
    assert [doc.text for doc in read_documents(str(tmp_path))] == ["one", "two \ufffd 🤖"]


def test_text_that_is_not_utf8_is_read_with_a_warning(tmp_path, capfd):
    (tmp_path / "a.txt").write_bytes("café".encode("latin-1"))
    (doc,) = read_documents(str(tmp_path / "a.txt"))
    assert doc.text == "caf\ufffd"
    assert "a.txt: 1 characters are not UTF-8" in capfd.readouterr().err


def test_folders_named_like_files_and_suffixes_in_capitals(tmp_path):
    (tmp_path / "a.txt").mkdir()
    (tmp_path / "B.TXT").write_text("text")
    assert [doc.text for doc in read_documents(str(tmp_path))] == ["text"]
    assert [doc.text for doc in read_documents(str(tmp_path / "*"))] == ["text"]


def test_a_source_with_a_key_gives_documents_that_fill_a_sequence(tmp_path):
    text = "word\n" * 8_000
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    assert max(len(doc.text) for doc in read_documents(str(tmp_path / "a.jsonl"))) <= PIECE
    long = list(read_documents(str(tmp_path / "a.jsonl"), seq_len=2_000))
    assert len(long[0].text) > 10_000
    assert len({doc.key for doc in long}) == 1
    (tmp_path / "b.txt").write_text(text)
    cut = list(read_documents(str(tmp_path / "b.txt"), seq_len=2_000))
    assert max(len(doc.text) for doc in cut) <= PIECE


def test_a_long_file_among_many_is_not_one_document(tmp_path):
    """It would fall into one split whole, and all of it would be held to find that out."""
    for i in range(25):
        (tmp_path / f"{i:02}.txt").write_text(f"file {i}\n" * (200_000 if i == 0 else 2_000))
    docs = list(read_documents(str(tmp_path)))
    keys = [doc.key for doc in docs if doc.text.startswith("file 0")]
    assert len(set(keys)) == len(set(doc.text for doc in docs if doc.text.startswith("file 0")))
    assert len({doc.key for doc in docs if doc.text.startswith("file 7")}) == 1


@pytest.mark.parametrize(
    ("spec", "match"),
    [("./no.txt", "no such file"), ("/no/*.txt", "no file matches"), ("no.jsonl", "no such file")],
)
def test_missing_corpora_are_named(spec, match):
    with pytest.raises(InputError, match=match):
        list(read_documents(spec))


def test_splits_are_90_5_5():
    counts = {name: 0 for name in SPLITS}
    for i in range(20_000):
        counts[split_of(str(i))] += 1
    assert counts["train"] == pytest.approx(18_000, abs=200)
    assert counts["calibration"] == pytest.approx(1_000, abs=120)


@pytest.mark.parametrize("n", [3, 4, 10, 100])
def test_small_corpora_fill_every_split(n):
    docs = [Document(str(i), "x") for i in range(n)]
    assert {split for split, _ in assign_splits(docs)} == set(SPLITS)


def test_two_documents_are_too_few():
    with pytest.raises(InputError, match="2 different document"):
        list(assign_splits([Document("a", "x"), Document("b", "x"), Document("a", "y")]))


def test_few_keys_with_endless_text_are_not_held(monkeypatch):
    monkeypatch.setattr("sparsecast.core.text.splits.HEAD", 1_000)
    read = []

    def docs():
        for i in range(5_000):
            read.append(i)
            yield Document(str(i % 3), "x" * 10)

    next(assign_splits(docs()))
    assert len(read) == 100


@given(st.lists(st.integers(0, 500), min_size=150, max_size=400))
def test_a_large_corpus_splits_by_the_hash_alone(numbers):
    docs = [Document(str(i), "x") for i in range(101)] + [Document(str(n), "x") for n in numbers]
    assert all(split == split_of(doc.key) for split, doc in assign_splits(docs))


@pytest.fixture(scope="module")
def tokenizer(model_folder):
    return AutoTokenizer.from_pretrained(model_folder)


ODD = ["  two spaces", "a\n\n\tb", "日本語 🤖 é\u0301", "<s> </s> <unk>", "\nx", "x" * 40, "a  b "]


@pytest.mark.parametrize("text", ODD)
def test_ids_are_sentencepieces_behind_one_bos(tokenizer, model_folder, text):
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model_folder / "tokenizer.model"))
    assert encode(tokenizer, text, 999) == [1, *pieces.encode(text)]


def test_quotas_are_met_exactly_and_padding_is_marked(tokenizer, corpus):
    quota = split_quotas(3_000)
    seen = dict.fromkeys(SPLITS, 0)
    docs = assign_splits(read_documents(str(corpus)))
    for batch in token_batches(docs, tokenizer, quota, seq_len=100, batch_size=4):
        seen[batch.split] += batch.tokens
        assert batch.ids_BS.shape == batch.keep_BS.shape
        assert batch.ids_BS.shape[1] <= 100
        assert torch.all(batch.ids_BS[:, 0] == 1)
        assert (batch.ids_BS == 1).sum() == len(batch.ids_BS)
        lengths = batch.keep_BS.sum(1)
        assert lengths.max() == batch.ids_BS.shape[1]
        steps = torch.arange(batch.ids_BS.shape[1])
        assert torch.equal(batch.keep_BS, steps < lengths[:, None])
    assert seen == quota
    assert sum(quota.values()) == 3_000


def test_json_lines_need_no_trailing_newline(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"t{i}"}) for i in range(5)))
    assert len(list(read_documents(str(path)))) == 5


def test_line_ends_and_outer_white_space_do_not_change_a_split(tmp_path):
    lines = [f"text {i}\nsecond line" for i in range(120)]
    forms = [str, "{}\n".format, " {} \n".format, lambda text: text.replace("\n", "\r\n")]
    keys = []
    for number, form in enumerate(forms):
        path = tmp_path / f"{number}.jsonl"
        path.write_text("".join(json.dumps({"text": form(text)}) + "\n" for text in lines))
        keys.append([doc.key for doc in read_documents(str(path))])
        folder = tmp_path / f"{number}"
        folder.mkdir()
        for i, text in enumerate(lines):
            (folder / f"{i:03}.txt").write_bytes(
                b"\xef\xbb\xbf" * (number > 0) + form(text).encode()
            )
        keys.append([doc.key for doc in read_documents(str(folder))])
    assert len(set(keys[0])) == 120
    assert keys == [keys[0]] * 8


def test_a_loop_of_links_is_read_once(tmp_path):
    (tmp_path / "a.txt").write_text("once")
    (tmp_path / "self").symlink_to(tmp_path)
    assert [doc.text for doc in read_documents(str(tmp_path / "**" / "*.txt"))] == ["once"]


def test_a_parquet_file_may_be_named_like_a_pattern(tmp_path):
    pq.write_table(pa.table({"text": ["one"]}), tmp_path / "a[1].parquet")
    assert [doc.text for doc in read_documents(str(tmp_path / "a[1].parquet"))] == ["one"]


def test_json_lines_that_are_not_utf8_are_read_with_a_warning(tmp_path, capfd):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    assert [doc.text for doc in read_documents(str(tmp_path / "a.jsonl"))] == ["caf\ufffd"]
    assert "1 characters are not UTF-8" in " ".join(capfd.readouterr().err.split())
