"""Broken corpora, as every stage reads one."""

from __future__ import annotations

import pytest
from broken.corpora import CASES, LINES, TABLE, TEXT, write
from broken.runner import Case, Reader, judge, refused

from sparsecast.core.text.corpus import read_documents


def of(name: str) -> Reader:
    def read(folder):
        docs = list(read_documents(str(folder / name)))
        assert docs
        assert all(doc.text.encode() for doc in docs), "a tokenizer takes it"

    return read


@pytest.mark.parametrize("name", [TEXT, LINES, TABLE])
def test_the_sound_corpus_is_read(name, tmp_path):
    of(name)(write(tmp_path / "c"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_broken(case: Case, tmp_path):
    judge(case, of(case.only), write(tmp_path / "c"))


def test_a_folder_is_not_left_through_links_in_a_circle(tmp_path):
    folder = write(tmp_path / "c")
    (folder / "again").symlink_to(folder)
    assert refused(lambda path: list(read_documents(str(path))), folder) is None
