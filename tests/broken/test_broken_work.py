"""Broken work folders, as the runs that resume from them read them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from broken.pickles import CANARY
from broken.runner import judge, refused
from broken.work import (
    CHATS,
    COLUMNS,
    CURVES,
    GIVEN,
    OF_CHATS,
    OF_CURVES,
    OF_OPTIONS,
    OF_STATES,
    OF_TOKENS,
    OPTIONS,
    SEQ_LEN,
    STATE,
    STATES,
    TOKENS,
    write,
)

from sparsecast.core.torch_files import load_state
from sparsecast.predictors.training.trainer import RECIPE, check_unfinished
from sparsecast.sparsify.chats import read_kept
from sparsecast.sparsify.sequences import open_rows
from sparsecast.sparsify.training.curve_table import begin_table, read_tables
from sparsecast.sparsify.work_folder import work_folder


def options(folder: Path) -> None:
    """Sparsify's: the work folder is named after the output."""
    work = folder.with_name(".out.work")
    folder.rename(work)
    try:
        with work_folder(folder.with_name("out"), GIVEN):
            pass
    finally:
        folder.symlink_to(work)  # removed by a run that has ended


def recipe(folder: Path) -> None:
    """Train's."""
    if os.path.lexists(folder / OPTIONS):
        (folder / OPTIONS).rename(folder / RECIPE)
    (folder / "last.ckpt").touch()
    assert check_unfinished(folder, GIVEN)


def state(folder: Path) -> None:
    assert load_state(folder / STATE, *STATES)["global_step"] == 3


def chats(folder: Path) -> None:
    assert len(read_kept(folder / CHATS, SEQ_LEN).train_N2S) == 3


def tokens(folder: Path) -> None:
    assert open_rows(folder / TOKENS, SEQ_LEN).max() < 2**16


def curves(folder: Path) -> None:
    begin_table(folder / CURVES, 1, step=5)
    assert (folder / CURVES).read_text().splitlines()[0] == COLUMNS
    read_tables(folder)


@pytest.mark.parametrize("read", [options, recipe, state, chats, tokens, curves])
def test_the_sound_folder_is_read(read, tmp_path):
    assert refused(read, write(tmp_path / "w")) is None


@pytest.mark.parametrize("case", OF_STATES, ids=str)
def test_broken_state(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    judge(case, state, write(tmp_path / "w"))
    assert not Path(CANARY).exists(), "code of the file was run"


@pytest.mark.parametrize("case", OF_CHATS, ids=str)
def test_broken_chats(case, tmp_path):
    judge(case, chats, write(tmp_path / "w"))


@pytest.mark.parametrize("case", OF_TOKENS, ids=str)
def test_broken_tokens(case, tmp_path):
    judge(case, tokens, write(tmp_path / "w"))


@pytest.mark.parametrize("case", OF_CURVES, ids=str)
def test_broken_curves(case, tmp_path):
    judge(case, curves, write(tmp_path / "w"))


@pytest.mark.parametrize("case", [case for case in OF_OPTIONS if not case.harmless], ids=str)
def test_broken_options(case, tmp_path):
    for read, name in ((options, ".out.work"), (recipe, "b")):
        folder = write(tmp_path / name[-1])
        case.damage(folder)
        told = refused(read, folder)
        assert told is not None
        assert told.isprintable()
        assert len(told.replace(str(tmp_path), "")) < 400
