"""Broken predictor folders, through `sparsecast inspect`; nothing in them is run."""

from __future__ import annotations

from pathlib import Path

import pytest
from broken.pickles import CANARY
from broken.predictors import CASES
from broken.runner import command, judge, refused


@pytest.fixture
def folder(make_predictors, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return make_predictors(tmp_path / "pred")


def test_the_sound_folder_is_read(folder):
    assert refused(command("inspect", "{}"), folder) is None


@pytest.mark.parametrize("case", CASES, ids=str)
def test_broken(case, folder):
    judge(case, command("inspect", "{}"), folder)
    assert not Path(CANARY).exists(), "code of the file was run"
