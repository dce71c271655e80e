"""Every form of a row is read, and every other row is counted, named and left out."""

from __future__ import annotations

import io
import json
import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsecast.core.errors import InputError
from sparsecast.core.text.corpus import NO_JSON, read_documents
from sparsecast.core.text.rows import UnusableRowError, parse_row
from sparsecast.core.text.skipped import SkippedRows

TURNS = (("user", "What is 1+1?"), ("assistant", "2"))
ASKED, SAID = (said for _, said in TURNS)
PART = {"type": "text", "text": ASKED}

CHATS = {
    "role and content": [
        {"role": "user", "content": ASKED},
        {"role": "assistant", "content": SAID},
    ],
    "from and value": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": SAID}],
    "role and value": [{"role": "user", "value": ASKED}, {"role": "assistant", "value": SAID}],
    "from and content": [{"from": "human", "content": ASKED}, {"from": "gpt", "content": SAID}],
    "mixed": [{"role": "user", "content": ASKED}, {"from": "gpt", "value": SAID}],
    "nulls beside": [
        {"role": "user", "from": None, "content": ASKED, "value": None},
        {"role": None, "from": "gpt", "content": None, "value": SAID},
    ],
    "capitals": [{"role": "User", "content": ASKED}, {"role": "ChatGPT ", "content": SAID}],
    "parts": [{"role": "user", "content": [PART]}, {"role": "model", "content": SAID}],
    "parts as a record of lists": [
        {"role": "user", "content": {"type": ["text"], "text": [ASKED]}},
        {"role": "assistant", "content": SAID},
    ],
    "record of lists": {"role": ["user", "assistant"], "content": [ASKED, SAID]},
    "sharegpt's record of lists": {"from": ["human", "gpt"], "value": [ASKED, SAID]},
}


@pytest.mark.parametrize("column", ["messages", "conversations"])
@pytest.mark.parametrize("form", CHATS)
def test_every_form_of_a_chat_is_read(column, form):
    assert parse_row({column: CHATS[form]}) == TURNS


@pytest.mark.parametrize("column", ["messages", "conversations"])
@pytest.mark.parametrize("form", ["role and content", "from and value", "parts", "record of lists"])
def test_every_form_of_a_file_gives_the_same_chat(column, form, tmp_path, monkeypatch):
    lines, table, row = tmp_path / "a.jsonl", tmp_path / "a.parquet", {column: CHATS[form]}
    if form == "parts":  # a column of parquet has one type
        row = {
            column: [CHATS[form][0], {"role": "model", "content": [{"type": "text", "text": "2"}]}]
        }
    lines.write_text(json.dumps(row) + "\n")
    pq.write_table(pa.Table.from_pylist([row]), table)
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(row)))
    docs = [doc for spec in (str(lines), str(table), "-") for doc in read_documents(spec)]
    assert [doc.chat for doc in docs] == [TURNS] * 3
    assert len({doc.key for doc in docs}) == 1


def test_parts_are_joined_by_line_ends_and_null_is_empty():
    parts = [{"type": "text", "text": "a"}, "b", {"type": "output_text", "text": None}]
    turns = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]},
        {"role": "observation", "content": []},
        {"role": "ipython", "content": "c"},
    ]
    assert parse_row({"messages": turns}) == (
        ("user", "a\nb\n"),
        ("assistant", ""),
        ("assistant", ""),
        ("tool", ""),
        ("ipython", "c"),
    )


@pytest.mark.parametrize("text", [None, "", " \n", 5, ["x"], {"a": "b"}])
def test_a_chat_beside_a_text_that_is_none_is_read(text):
    assert parse_row({"text": text, "messages": CHATS["parts"]}) == TURNS


def test_a_text_is_preferred_and_a_chat_that_fails_gives_way():
    assert parse_row({"messages": CHATS["mixed"], "text": " x "}) == " x "
    assert parse_row({"messages": [], "conversations": CHATS["mixed"]}) == TURNS
    assert parse_row({"messages": [{}], "conversations": CHATS["mixed"]}) == TURNS


IMAGE = {"type": "image_url", "image_url": {"url": "x"}, "text": None}
DEEP = json.loads("[" * 300 + "]" * 300)
BAD = [
    ({}, "expected a string under 'text'.*found nothing"),
    ({"prompt": "x"}, r"expected a string under 'text'.*found prompt \(str\)"),
    ({"text": None}, r"found text \(NoneType\)"),
    ({"text": 1}, r"found text \(int\)"),
    ({"text": ["x"]}, r"found text \(list\)"),
    ({"text": ""}, "nothing but white space under 'text'"),
    ({"text": " \n\t\u3000"}, "nothing but white space"),
    ({"text": DEEP}, r"found text \(list\)"),
    ({"messages": "hello"}, "expected a list of turns under 'messages', found str"),
    ({"messages": 7, "text": None}, "found int"),
    ({"messages": {"role": ["user"], "content": "x"}}, "expected a list of turns .*found dict"),
    ({"messages": {"role": ["user", "x"], "content": ["x"]}}, "expected a list of turns"),
    ({"messages": []}, "nothing is said under 'messages'"),
    ({"messages": {}}, "nothing is said under 'messages'"),
    ({"messages": [{"role": "user", "content": None}]}, "nothing is said"),
    ({"messages": [{"role": "user", "content": " "}]}, "nothing is said"),
    ({"messages": [None]}, "turn 1 under 'messages' is no object but NoneType"),
    ({"conversations": ["a", "b"]}, "turn 1 under 'conversations' is no object but str"),
    ({"messages": DEEP}, "turn 1 under 'messages' is no object but list"),
    ({"messages": [{"content": "x"}]}, "turn 1 .* has no string under 'role' or 'from'"),
    ({"messages": [{"role": 3, "content": "x"}]}, "has no string under 'role'"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "has no string under 'role'"),
    ({"messages": [{"role": "user"}]}, "turn 1 .* has no 'content' or 'value'"),
    ({"messages": [{"role": "user", "text": "x"}]}, "has no 'content' or 'value'"),
    ({"messages": [{"role": "user", "content": 3}]}, "neither text nor parts but int"),
    ({"messages": [{"role": "user", "content": {"type": "text"}}]}, "nor parts but dict"),
    (
        {"messages": [{"role": "user", "content": [PART, IMAGE]}]},
        "turn 1 .* holds a part of type image_url, expected text alone",
    ),
    ({"messages": [{"role": "user", "content": [PART, {"text": "x"}]}]}, "part of type None"),
    ({"messages": [{"role": "user", "content": [DEEP]}]}, "part of type list"),
    ({"messages": [{"role": "user", "content": [{"type": DEEP}]}]}, "part of type .*expected"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": 4}]}]},
        r"part of type text \(int\)",
    ),
]


@pytest.mark.parametrize(("row", "match"), BAD)
def test_rows_that_cannot_be_used_say_why_in_one_line(row, match):
    with pytest.raises(UnusableRowError, match=match) as caught:
        parse_row(row)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_hostile_name_is_shortened_and_printable():
    row = {"\x1b[2J\n" + "x" * 10_000: 1} | {f"c{i}": i for i in range(5_000)}
    with pytest.raises(UnusableRowError, match=r"found \ufffd\[2J\ufffdxxx") as caught:
        parse_row(row)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(("row", "match"), BAD)
def test_a_bad_row_does_not_end_the_run(row, match, tmp_path):
    path, skipped = tmp_path / "a.jsonl", SkippedRows("a")
    good = json.dumps({"text": "fine"})
    path.write_text(f"{good}\n\n{json.dumps(row)}\n{good}\n")
    docs = list(read_documents(str(path), skipped=skipped))
    assert [(doc.text, doc.where) for doc in docs] == [("fine", f"{path}:1"), ("fine", f"{path}:4")]
    assert (skipped.read, skipped.count) == (3, 1)
    assert skipped.first[0].startswith(f"{path}:3: ")


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{", "not JSON"),
        ('{"text": "cut sho', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"text": ' + "9" * 5000 + "}", "not JSON"),
        ("[1, 2]", "is no JSON object but list"),
        ("null", "is no JSON object but NoneType"),
        ("plain words", "not JSON"),
    ],
)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_line_that_is_no_object_is_left_out(line, match, place, tmp_path):
    path, skipped = tmp_path / "a.jsonl", SkippedRows("a")
    lines = [json.dumps({"text": "one"}), json.dumps({"text": "two"})]
    path.write_text("\n".join([*lines[:place], line, *lines[place:]]))
    assert [doc.text for doc in read_documents(str(path), skipped=skipped)] == ["one", "two"]
    assert skipped.count == 1
    assert skipped.first[0].startswith(f"{path}:{place + 1}: {match}")


def test_a_file_without_any_json_ends_the_run_early(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n')
    (tmp_path / "b.jsonl").write_text("words\n" * (NO_JSON - 1) + '{"text": "late"}\n')
    assert len(list(read_documents(str(tmp_path)))) == 2
    (tmp_path / "b.jsonl").write_text("words\n" * NO_JSON + '{"text": "late"}\n')
    with pytest.raises(InputError, match=r"b\.jsonl:1: not JSON .*expected one object a line"):
        list(read_documents(str(tmp_path)))


def test_a_corpus_in_which_nothing_can_be_used_ends_the_run(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "x"}\n' * 20)
    with pytest.raises(InputError, match=r"cannot use any of its first 20 rows: .*a\.jsonl:1: exp"):
        list(read_documents(str(path)))
    monkeypatch.setattr("sparsecast.core.text.skipped.GIVE_UP", 5)
    with pytest.raises(InputError, match=r"first 5 rows: .*; and 2 more"):
        list(read_documents(str(path)))
    path.write_text('{"text": "x"}\n' + '{"prompt": "x"}\n' * 20)
    assert len(list(read_documents(str(path)))) == 1


def test_rows_of_parquet_are_named_by_number_and_counted(tmp_path, caplog):
    path, skipped = tmp_path / "a.parquet", SkippedRows("a.parquet")
    pq.write_table(pa.table({"text": ["x", None, "", "y", None, None]}), path)
    docs = list(read_documents(str(path), skipped=skipped))
    assert [doc.text for doc in docs] == ["x", "y"]
    with caplog.at_level(logging.WARNING, "sparsecast"):
        skipped.tell()
    (told,) = caplog.messages
    assert told.startswith("a.parquet: 4 of 6 rows cannot be used and were left out: ")
    assert f"{path}, row 2: expected a string" in told
    assert f"{path}, row 3: nothing but white space" in told
    assert told.endswith("; and 1 more")


def test_nothing_is_told_where_nothing_was_left_out(caplog):
    SkippedRows("a", read=3).tell()
    assert caplog.messages == []


def test_lone_surrogates_in_roles_and_contents_are_replaced(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"messages": [{"role": "us\\ud800er", "content": "a\\udc00b"}]}')
    (doc,) = read_documents(str(path))
    assert doc.chat == (("us\ufffder", "a\ufffdb"),)


JSON = st.recursive(
    st.sampled_from([None, True, 3, 0.5, "", " ", "x", "text", "user"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["text", "type", "role", "from", "content", "value", "x"]), inner
        )
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(["text", "messages", "conversations", "x"]), JSON))
def test_any_row_is_text_or_a_chat_or_refused(row):
    try:
        content = parse_row(row)
    except UnusableRowError:
        return
    said = [content] if isinstance(content, str) else [said for _, said in content]
    assert any(text.strip() for text in said)
    assert isinstance(content, str) or all(isinstance(role, str) for role, _ in content)
