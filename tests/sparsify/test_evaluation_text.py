"""What is measured comes from all of the text that was read, evenly."""

from __future__ import annotations

import json
from string import ascii_lowercase

from hypothesis import given
from hypothesis import strategies as st

from sparsecast.core.text.builtin import hash_key
from sparsecast.core.text.splits import split_of
from sparsecast.core.text.tokens import Sequence
from sparsecast.sparsify.config import SparsifyConfig
from sparsecast.sparsify.evaluation_text import few_of_each, spread
from sparsecast.sparsify.plan import make_plan
from sparsecast.sparsify.prepare import prepare
from sparsecast.sparsify.work_folder import work_folder

LENGTHS = st.lists(st.integers(2, 40), max_size=60)


def rows_of(lengths: list[int]) -> list[Sequence]:
    """Rows whose ids count the tokens of all of them."""
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return [
        Sequence("held-out", list(range(end - length, end)), False)
        for length, end in zip(lengths, ends, strict=True)
    ]


@given(LENGTHS, st.integers(1, 400))
def test_the_number_of_tokens_is_met_but_for_a_row(lengths, tokens):
    chosen = list(spread(rows_of(lengths), tokens))
    count = sum(len(row.ids) for row in chosen)
    wanted = min(tokens, sum(lengths))
    assert wanted - max(lengths, default=0) < count <= wanted or count == wanted
    assert all(len(row.ids) >= 2 for row in chosen)


@given(LENGTHS, st.integers(0, 50))
def test_text_that_is_too_short_is_taken_whole(lengths, more):
    rows = rows_of(lengths)
    assert list(spread(rows, sum(lengths) + more)) == rows


@given(st.integers(2, 40), st.integers(1, 30), st.integers(2, 8))
def test_equal_rows_are_taken_at_equal_distances(length, count, step):
    chosen = list(spread(rows_of([length] * (count * step)), length * count))
    assert [row.ids[0] // length for row in chosen] == list(range(0, count * step, step))


@given(LENGTHS.filter(bool), st.integers(1, 400))
def test_no_stretch_of_the_text_is_left_out(lengths, tokens):
    """At any place as large a share of the rows before it is taken as of all, but for a row."""
    rows = rows_of(lengths)
    taken = {row.ids[0]: len(row.ids) for row in spread(rows, tokens)}
    total, seen, kept = max(tokens, sum(lengths)), 0, 0
    for row in rows:
        seen += len(row.ids)
        kept += taken.get(row.ids[0], 0)
        assert abs(kept - tokens * seen / total) <= max(lengths)


def test_the_row_that_would_be_too_much_is_cut_and_says_so():
    first, last = spread(rows_of([10, 10]), 15)
    assert (first.ids, first.truncated) == (list(range(10)), False)
    assert (last.ids, last.truncated) == (list(range(10, 15)), True)


def documents_of(counts: list[int], length: int = 10) -> list[Sequence]:
    """Documents of that many windows each; the ids are the document and the window."""
    return [
        Sequence("held-out", [document, window] * (length // 2), False, window == 0)
        for document, count in enumerate(counts)
        for window in range(count)
    ]


@given(st.lists(st.integers(1, 30), max_size=20), st.integers(1, 2000))
def test_no_document_gives_more_windows_than_it_takes(counts, tokens):
    rows = few_of_each(documents_of(counts), tokens)
    taken = [sum(row.ids[0] == document for row in rows) for document in range(len(counts))]
    most = max(taken, default=0)
    assert taken == [min(count, most) for count in counts]
    assert 10 * sum(taken) >= min(tokens, 10 * sum(counts))
    assert 10 * sum(min(count, most - 1) for count in counts) < tokens
    assert rows == sorted(rows, key=lambda row: row.ids[:2])


def test_windows_of_a_document_are_at_equal_distances():
    rows = few_of_each(documents_of([1, 12, 2]), 50)
    assert [row.ids[:2] for row in rows] == [[0, 0], [1, 3], [1, 9], [2, 0], [2, 1]]
    assert [row.ids[:2] for row in few_of_each(documents_of([1, 9]), 1)] == [[0, 0], [1, 4]]


def held_out(text: str) -> bool:
    return split_of(hash_key(text)) == "held-out"


def test_a_long_document_does_not_decide_what_is_measured(dense, tmp_path):
    """One that is longer than all others together gives a window, as they do."""
    corpus = tmp_path / "corpus.jsonl"
    words = [a + b for a in ascii_lowercase for b in ascii_lowercase]
    long = next(text for word in words if held_out(text := f"{word} " * 1500))
    texts = [f"{word} " * 12 for word in words] + [long]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = SparsifyConfig(
        model=str(dense()),
        corpus=str(corpus),
        out=tmp_path / "out",
        seq_len=32,
        batch_tokens=64,
        tokens=640,
        eval_tokens=320,
    )
    plan = make_plan(config)
    with work_folder(plan.out, plan.options) as work:
        setup = prepare(plan, work)
    lengths = [int(row.sum()) for batch in setup.held_out for row in batch.keep_BS]
    assert lengths.count(32) <= 1 < len(lengths)


def test_what_is_measured_comes_from_many_documents(dense, tmp_path):
    """The first of each split have as many tokens as are asked for."""
    corpus = tmp_path / "corpus.jsonl"
    words = [a + b for a in ascii_lowercase for b in ascii_lowercase][:500]
    texts = [f"{word} " * 120 for word in words]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    plan = make_plan(
        SparsifyConfig(
            model=str(dense()),
            corpus=str(corpus),
            out=tmp_path / "out",
            seq_len=32,
            batch_tokens=64,
            tokens=640,
            eval_tokens=640,
        )
    )
    with work_folder(plan.out, plan.options) as work:
        setup = prepare(plan, work)
    for batches in (setup.calibration, setup.held_out):
        assert sum(batch.tokens for batch in batches) in range(640 - 32, 641)
        rows = [batch.ids_BS[i, 1:] for batch in batches for i in range(len(batch.ids_BS))]
        documents = {word for ids in rows for word in setup.tokenizer.decode(ids).split()[1:-1]}
        assert len(documents) > 8
