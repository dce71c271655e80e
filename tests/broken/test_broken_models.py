"""Broken weights and configs, as every stage loads a model."""

from __future__ import annotations

from pathlib import Path

import pytest
from broken.models import CASES
from broken.pickles import CANARY
from broken.runner import judge, refused

from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.loading import load_model


def read(folder: Path) -> None:
    load_model(str(folder), device="cpu")
    assert len(Checkpoint(str(folder)).fingerprint) == 16


def test_the_sound_model_is_read(sound_model):
    assert refused(read, sound_model) is None


@pytest.mark.parametrize("case", CASES, ids=str)
def test_broken(case, sound_model, copy_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    judge(case, read, copy_of(sound_model, tmp_path / "m"))
    assert not Path(CANARY).exists(), "code of the file was run"
