"""The files of a corpus are all read, or the one that cannot be is named."""

from __future__ import annotations

import os

import pytest

from sparsecast.core.errors import InputError
from sparsecast.core.text.corpus import read_documents, start_reading
from sparsecast.core.text.corpus_files import is_stream, max_tokens


def read(spec) -> list[str]:
    return [doc.text for doc in read_documents(str(spec))]


@pytest.mark.parametrize("spec", ["", " ", "\t"])
def test_an_empty_name_is_not_the_current_folder(spec, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="--corpus: is empty"):
        read(spec)
    assert read(".") == ["text"]


@pytest.fixture
def closed(as_nobody):
    """A corpus with a folder that may not be listed, and beside it a file that may not be read."""
    folder = as_nobody.folder
    for name in ("a", "b", "c/deep"):
        (folder / name).mkdir(parents=True)
        (folder / name / "x.txt").write_text(name)
    (folder / "b").chmod(0)
    yield as_nobody
    (folder / "b").chmod(0o755)


@pytest.mark.parametrize("pattern", ["", "*/*.txt", "**/*.txt", "b/*.txt", "[ab]/x.txt"])
def test_a_folder_that_may_not_be_read_is_not_left_out(closed, pattern):
    spec = f"{closed.folder}/{pattern}" if pattern else str(closed.folder)
    with closed(), pytest.raises(InputError, match=r"/b: may not be read \(Permission denied\)"):
        read(spec)


def test_folders_that_a_pattern_does_not_enter_may_be_closed(closed):
    with closed():
        assert read(f"{closed.folder}/a/*.txt") == ["a"]


def test_below_a_closed_folder_nothing_is_called_missing(closed):
    with closed(), pytest.raises(InputError, match=r"b/x\.txt: may not be read"):
        read(closed.folder / "b" / "x.txt")


def test_a_file_that_may_not_be_read_is_named_before_the_others_are_read(closed):
    path = closed.folder / "c" / "x.jsonl"
    path.write_text("{}")
    path.chmod(0)
    (closed.folder / "b").chmod(0o755)
    with closed(), pytest.raises(InputError, match=r"x\.jsonl: may not be read"):
        next(read_documents(str(closed.folder)))


def test_links_to_nothing_and_fifos_are_not_left_out(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match=r"b\.txt: no such file"):
        read(tmp_path)
    (tmp_path / "b.txt").unlink()
    os.mkfifo(tmp_path / "b.txt")
    for spec in (tmp_path, tmp_path / "*.txt"):
        with pytest.raises(InputError, match=r"b\.txt: is a FIFO"):
            read(spec)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(InputError, match="Too many levels of symbolic links"):
        read(tmp_path / "loop")
    with pytest.raises(InputError, match="no file matches"):
        read(tmp_path / "loop" / "*.txt")


def test_text_in_place_of_a_name_is_not_a_traceback():
    with pytest.raises(InputError, match="File name too long"):
        read("some words " * 1000)


def test_what_is_read_once(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "a.txt").write_text("text")
    streams = ["-", str(tmp_path / "fifo"), "/dev/null"]
    assert [s for s in [*streams, str(tmp_path), str(tmp_path / "a.txt")] if is_stream(s)] == (
        streams
    )


def test_the_first_item_is_read_at_once_but_for_streams():
    seen = []

    def items():
        for i in range(3):
            seen.append(i)
            yield i

    stream = start_reading("-", items())
    assert seen == []
    assert list(stream) == [0, 1, 2]
    seen.clear()
    stream = start_reading("a.txt", items())
    assert seen == [0]
    assert list(stream) == [0, 1, 2]
    assert list(start_reading("a.txt", [])) == []


@pytest.mark.parametrize("seq_len", [2, 3, 64])
def test_no_corpus_gives_more_tokens_than_its_bound(seq_len, tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(bytes(range(1, 128)) * 3)
    tokens = path.stat().st_size  # one a byte, in windows of one BOS each
    windows = -(-tokens // (seq_len - 1))
    assert tokens + windows <= max_tokens(str(path), seq_len) <= tokens + windows + 2
