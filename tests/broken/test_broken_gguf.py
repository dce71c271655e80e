"""Broken PWRI and GGUF files, through `sparsecast inspect` and the checks of `verify`."""

from __future__ import annotations

import pytest
from broken.gguf import CASES, write
from broken.runner import command, judge, refused

from sparsecast.core.errors import InputError
from sparsecast.export.checks.run import FILE_CHECKS
from sparsecast.export.read.reader import GGUFFile


def test_the_sound_file_is_read(tmp_path):
    assert refused(command("inspect", "{}"), write(tmp_path / "x.gguf")) is None


@pytest.mark.parametrize("case", CASES, ids=str)
def test_broken(case, tmp_path):
    judge(case, command("inspect", "{}"), write(tmp_path / "x.gguf"))


@pytest.mark.parametrize("case", [case for case in CASES if case.harmless], ids=str)
def test_verify_never_breaks_on_what_inspect_shows(case, tmp_path):
    """It stops at the first check that fails."""
    path = write(tmp_path / "x.gguf")
    case.damage(path)

    def read(path):
        file = GGUFFile(path)
        for check in FILE_CHECKS:
            if not (found := check(file)).ok:
                raise InputError(found.detail)

    told = refused(read, path)
    assert told is not None, "no predictors, no vocabulary"
    assert told.isprintable()
    assert len(told) < 2000
