"""Text that is not UTF-8 is said to be at its first byte, or refused."""

from __future__ import annotations

import os
import sys
from io import BytesIO
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sparsecast.core.errors import InputError
from sparsecast.core.text.corpus import read_documents
from sparsecast.core.text.encoding import BLOCK


def texts(spec) -> list[str]:
    return [doc.text for doc in read_documents(str(spec))]


def told(capfd) -> str:
    return " ".join(capfd.readouterr().err.split())


def test_the_first_bad_byte_is_told_before_the_end_of_the_file(tmp_path, capfd):
    """A token budget ends a run long before the file ends."""
    path = tmp_path / "long[1].txt"
    path.write_bytes(b"line\n" * 10 + "caf\xe9\n".encode("cp1252") + b"line\n" * BLOCK)
    next(islice(read_documents(str(path)), 1))
    said = told(capfd)
    assert "long[1].txt: the byte 0xe9 at offset 53 is not UTF-8" in said
    assert "looks like Windows-1252" in said
    assert "`iconv -f WINDOWS-1252 -t UTF-8`" in said


@pytest.mark.parametrize(
    ("content", "offset", "looks"),
    [
        (b"\xef\xbb\xbf\r\na\xe4", 6, "Windows-1252"),
        ("日本語".encode() + b"x\xffy", 10, "the text around it is UTF-8"),
        ("日本語".encode()[:-1], 6, "the text around it is UTF-8"),
        ("日本語テキスト".encode("shift_jis"), 0, "an older encoding of Asian"),
        ("中文文本".encode("gb18030"), 0, "an older encoding of Asian"),
        ("привет мир".encode("cp1251"), 0, "an older encoding of Asian, Cyrillic"),
        (b"a" * (BLOCK - 1) + "é".encode() + b"\x93", BLOCK + 1, "Windows-1252"),
    ],
)
def test_offset_and_guess(tmp_path, capfd, content, offset, looks):
    (tmp_path / "a.txt").write_bytes(content)
    got = "".join(texts(tmp_path / "a.txt"))
    assert got.count("\ufffd") == content.decode("utf-8-sig", "replace").count("\ufffd") > 0
    said = told(capfd)
    assert f"at offset {offset:,} is not UTF-8" in said
    assert looks in said


def test_a_row_of_json_lines_is_told_by_its_offset(tmp_path, capfd):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "caf\xe9"}\n{"text": "\xe9\xe9"}\n')
    assert texts(path) == ["a", "caf\ufffd", "\ufffd\ufffd"]
    said = told(capfd)
    assert said.count("is not UTF-8") == 1
    assert "0xe9 at offset 27" in said
    assert "3 characters are not UTF-8" in said


def test_a_replacement_character_in_utf8_is_text(tmp_path, capfd):
    (tmp_path / "a.txt").write_text("a \ufffd b", encoding="utf-8")
    assert texts(tmp_path / "a.txt") == ["a \ufffd b"]
    assert not told(capfd)


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.jsonl", "-"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-le", "utf-16-be"])
def test_utf_16_is_named(tmp_path, monkeypatch, name, encoding):
    data = '{"text": "x"}\n'.encode(encoding)
    path = tmp_path / name
    path.write_bytes(data)
    if name == "-":
        monkeypatch.setattr("sys.stdin", type("In", (), {"fileno": _none, "buffer": BytesIO(data)}))
    with pytest.raises(InputError) as refused:
        list(read_documents("-" if name == "-" else str(path)))
    said = str(refused.value)
    assert "iconv -f UTF-" in said
    assert ("standard input" if name == "-" else str(path)) in said
    if encoding in ("utf-16", "utf-32"):
        assert f"byte order mark of {encoding.upper()}" in said


def _none(*_: object) -> int:
    from io import UnsupportedOperation

    raise UnsupportedOperation


def test_byte_order_marks_between_json_lines_are_none_of_the_json(tmp_path):
    row = b'\xef\xbb\xbf{"text": "a"}\n'
    (tmp_path / "a.jsonl").write_bytes(row * 2)
    assert texts(tmp_path / "a.jsonl") == ["a", "a"]


def test_line_ends_are_as_python_reads_them(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a\r\nb\rc\nd")
    assert texts(tmp_path / "a.txt") == ["a\nb\nc\nd"]
    half = b"x" * (BLOCK - 1) + b"\r\n" + b"y"
    (tmp_path / "b.txt").write_bytes(half)
    assert "".join(texts(tmp_path / "b.txt")) == "x" * (BLOCK - 1) + "\ny"


def test_parquet_that_is_not_utf8_is_not_called_a_missing_dataset(tmp_path):
    offsets = pa.py_buffer(b"\0\0\0\0\4\0\0\0\7\0\0\0")
    text = pa.StringArray.from_buffers(2, offsets, pa.py_buffer(b"caf\xe9abc"))
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": text}), path)
    with pytest.raises(InputError, match=r"a\.parquet: cannot be read as parquet .*0xe9"):
        texts(path)
    path.write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"a\.parquet: cannot be read as parquet"):
        texts(path)


def test_a_json_line_longer_than_a_block_is_one_row(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "' + "é" * (2 * BLOCK) + '"}\n{"text": "b"}\n')
    assert "".join(texts(tmp_path / "a.jsonl")) == "é" * (2 * BLOCK) + "b"


@pytest.mark.skipif(sys.platform != "linux", reason="names of descriptors")
@pytest.mark.parametrize(
    ("data", "want"),
    [
        (b"plain\r\ntext", ["plain\ntext"]),
        (b'\n\n{"text": "one"}\n{"text": "two"}', ["one", "two"]),
        (b'{"text": "' + b"x" * (BLOCK + 9) + b'"}', ["x" * (BLOCK + 9)]),
        (b"x" * (BLOCK + 9), ["x" * (BLOCK + 9)]),
    ],
)
def test_what_a_shell_has_opened_is_read_like_standard_input(tmp_path, data, want):
    """`<(command)` is such a name; of a file too, which a shell may have opened as well."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    held = os.fdopen(write, "wb", buffering=0)
    file = tmp_path / "a"
    file.write_bytes(data)
    opened = file.open("rb")
    if len(data) < BLOCK:
        held.write(data)
        held.close()
        assert texts(f"/dev/fd/{read}") == want
    os.close(read)
    got = texts(f"/dev/fd/{opened.fileno()}")
    assert "".join(got) == "".join(want)


def test_a_fifo_is_read_once_and_in_order(tmp_path):
    path = tmp_path / "fifo"
    os.mkfifo(path)
    end = os.open(path, os.O_RDWR)
    os.write(end, b'{"text": "a"}\n{"text": "b"}\n')
    docs = read_documents(str(path))
    assert next(docs).text == "a"
    os.close(end)
    assert [doc.text for doc in docs] == ["b"]


def test_an_endless_line_of_nothing_is_refused_before_it_fills_memory():
    with pytest.raises(InputError, match="/dev/zero: holds NUL bytes"):
        texts("/dev/zero")
    with pytest.raises(InputError, match="/dev/null: no text"):
        texts("/dev/null")
