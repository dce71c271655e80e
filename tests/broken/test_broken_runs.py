"""Broken records of runs, as rerun reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
from broken.runner import judge, refused
from broken.runs import NAME, RUNS, write

from sparsecast.cli.rerun import config_of
from sparsecast.core.run_record import read_run
from sparsecast.export.config import ExportConfig


@pytest.fixture
def folder(tmp_path) -> Path:
    return write(tmp_path / "out")


def read(folder: Path) -> None:
    path = folder / NAME
    config = config_of(read_run(path), path, None)
    assert isinstance(config, ExportConfig)
    assert config.out == Path("o")


def test_the_sound_record_is_read(folder):
    assert refused(read, folder) is None


@pytest.mark.parametrize("case", RUNS, ids=str)
def test_broken_record(case, folder):
    judge(case, read, folder)
