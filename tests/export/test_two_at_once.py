"""Two exports into one folder: the second is refused, and the first one's bundle is whole."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from filelock import FileLock

from sparsecast.core.errors import InputError
from sparsecast.export import plan as planning
from sparsecast.export import run as stage
from sparsecast.export.config import ExportConfig
from sparsecast.export.run import export


@pytest.fixture
def asked(model_folder, predictors, tmp_path) -> ExportConfig:
    return ExportConfig(model=str(model_folder), predictors=predictors, out=tmp_path / "bundle")


def test_a_second_export_is_refused_while_the_first_writes(asked, monkeypatch):
    write, refused = stage.write_model, []

    def meanwhile(path: Path, *args: object, **options: object) -> None:
        with pytest.raises(InputError, match="another export is writing it") as second:
            export(asked)
        refused.append(second)
        write(path, *args, **options)

    monkeypatch.setattr(stage, "write_model", meanwhile)
    file = export(asked)
    assert len(refused) == 1
    assert file.is_file()
    assert [path.name for path in asked.out.parent.iterdir()] == ["bundle"]


def test_a_link_to_the_folder_is_the_folder(asked, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "bundle")
    with (
        FileLock(tmp_path / ".bundle.lock"),
        pytest.raises(InputError, match="another export is writing it"),
    ):
        export(ExportConfig(**{**vars(asked), "out": tmp_path / "link"}))


def test_the_lock_of_a_killed_export_holds_nobody_up(asked):
    lock = asked.out.parent / ".bundle.lock"
    child = os.fork()
    if child == 0:
        FileLock(lock).acquire()
        os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    assert lock.is_file()
    export(asked)
    assert not lock.exists()


@pytest.mark.parametrize("out", ["/proc/bundle", "/dev/null/bundle"])
def test_an_out_that_cannot_be_written_is_refused_before_the_model_is_read(asked, monkeypatch, out):
    monkeypatch.setattr(planning, "Checkpoint", lambda _: pytest.fail("the model was read"))
    with pytest.raises(InputError, match=f"{out}: cannot be written"):
        export(ExportConfig(**{**vars(asked), "out": Path(out)}))


def test_what_the_bundle_takes_is_told_within_a_tenth(asked, capfd):
    export(asked)
    said = re.search(r"the bundle takes ([\d.]+) MB of disk", capfd.readouterr().err)
    assert said is not None
    held = sum(path.stat().st_size for path in asked.out.rglob("*") if path.is_file())
    assert float(said[1]) * 1e6 == pytest.approx(held, rel=0.1)
