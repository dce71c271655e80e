"""Broken tokenizer files, as every stage opens a model."""

from __future__ import annotations

from pathlib import Path

import pytest
from broken.pickles import CANARY
from broken.runner import judge
from broken.tokenizer_files import CASES

from sparsecast.core.models.loading import open_model


def read(folder: Path) -> None:
    _, tokenizer = open_model(str(folder))
    assert tokenizer("the quick brown fox", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_broken(case, sound_model, copy_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    judge(case, read, copy_of(sound_model, tmp_path / "m"))
    assert not Path(CANARY).exists(), "code of the folder was run"
