"""Broken gpuidx files, through `sparsecast inspect` and verify's check of the split."""

from __future__ import annotations

import pytest
from broken.gpuidx import BESIDE, CASES, MODEL, SPLIT, write
from broken.runner import assert_message, command, judge, refused

from sparsecast.core.errors import InputError
from sparsecast.export.checks.gpu_split import check_gpu_split
from sparsecast.export.read.reader import GGUFFile


def check(folder):
    """As verify does, once the model's file has passed."""
    for found in check_gpu_split(GGUFFile(folder / MODEL), folder):
        if not found.ok:
            raise InputError(f"{folder}: {found.detail}")


def show(folder):
    command("inspect", "{}")(folder / SPLIT)


@pytest.mark.parametrize("read", [check, show])
def test_the_sound_file_is_read(read, tmp_path):
    assert refused(read, write(tmp_path / "x")) is None


@pytest.mark.parametrize("case", CASES, ids=str)
def test_broken(case, tmp_path):
    judge(case, check, write(tmp_path / "x"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_inspect_shows_or_refuses_it(case, tmp_path):
    folder = write(tmp_path / "x")
    case.damage(folder)
    if (told := refused(show, folder)) is not None:
        assert_message(told, folder)


@pytest.mark.parametrize("beside", BESIDE)
def test_inspect_needs_no_sound_model_beside_it(beside, tmp_path):
    folder = write(tmp_path / "x")
    (folder / MODEL).write_bytes(BESIDE[beside])
    assert refused(show, folder) is None
