"""Training estimates its disk space first, refuses a full disk, and explains one that fills up."""

from __future__ import annotations

import errno
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from sparsecast.core import disk, lightning
from sparsecast.core.distributed import DistributedContext
from sparsecast.core.errors import InputError
from sparsecast.predictors.config import TrainConfig
from sparsecast.predictors.planning import make_plan, open_source, resolve
from sparsecast.predictors.train import train
from sparsecast.predictors.training import trainer
from sparsecast.predictors.training.needs import check_needs
from sparsecast.predictors.training.plan import work_folder

RANK = 32


@pytest.fixture
def asked(synthetic, tmp_path):
    return TrainConfig(
        activations=synthetic.folder, out=tmp_path / "pred", rank=RANK, epochs=2, batch_size=1024
    )


def taken(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def fullest(monkeypatch, asked):
    """The most bytes on the disk whenever a checkpoint was put in place."""
    seen: list[int] = []
    replace_file = os.replace

    def measured(source, target) -> None:
        seen.append(taken(asked.out.parent))
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", measured)
    return seen


@pytest.mark.parametrize("options", [{}, {"predictor_dtype": "f16"}, {"recipe": "reference"}])
def test_the_estimate_is_within_a_tenth(asked, fullest, capfd, options):
    train(replace(asked, rank=64, **options))
    said = re.search(r"takes up to ([\d.]+) (kB|MB) of disk", capfd.readouterr().err)
    assert said is not None
    told = float(said[1]) * {"kB": 1e3, "MB": 1e6}[said[2]]
    assert told == pytest.approx(max(fullest), rel=0.1)


def test_values_take_a_byte_per_neuron_of_four_batches(asked, caplog):
    caplog.set_level("INFO")
    request = resolve(asked, DistributedContext())
    plan = make_plan(request, open_source(request))
    for loss in ("count", "value"):
        check_needs(replace(plan, loss=loss))
    less, more = map(float, re.findall(r"([\d.]+) MB of memory", caplog.text))
    assert more - less == pytest.approx(4 * 1024 * 2 * 200 / 1e6, abs=0.02)


def test_a_run_too_large_for_the_disk_is_refused_before_training(asked, monkeypatch):
    monkeypatch.setattr(disk, "free_bytes", lambda _: 100_000)
    monkeypatch.setattr(trainer.L, "Trainer", lambda **_: pytest.fail("training began"))
    with pytest.raises(InputError, match="training needs .*, but only 100 kB are free there"):
        train(asked)
    assert not list(asked.out.parent.iterdir())


@pytest.mark.parametrize("epochs", [0, 1])
def test_a_full_disk_keeps_the_last_epoch_whole(asked, monkeypatch, epochs):
    """The second run resumes from it, and ends like one that was never stopped."""
    done, save = [], lightning.save_torch

    def full(value: object, path: Path) -> None:
        assert path.parent == work_folder(asked.out)  # not the system's temporary folder
        if len(done) == epochs:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        done.append(path)
        save(value, path)

    monkeypatch.setattr(lightning, "save_torch", full)
    with pytest.raises(OSError, match="last.ckpt: No space left on device") as failed:
        train(asked)
    said = str(failed.value)
    assert f"{asked.out}: cannot be written" in said
    assert re.search(r"training needs [\d.]+ kB of disk, [\d.]+ GB are free there now", said)
    work = work_folder(asked.out)
    if not epochs:
        assert "nothing is left behind" in said
        assert not work.exists()
        return
    assert "the last finished epoch is kept: make room, and the same command goes on" in said
    assert [path.name for path in work.iterdir() if "last" in path.name] == ["last.ckpt"]
    monkeypatch.setattr(lightning, "save_torch", save)
    resumed = train(asked)
    whole = train(replace(asked, out=asked.out.with_name("whole")))
    for a, b in zip(resumed.layers, whole.layers, strict=True):
        assert all(map(lambda x, y: x.equal(y), a.weights, b.weights))


def test_resuming_removes_half_a_checkpoint_of_a_killed_run(asked, monkeypatch):
    save, part = lightning.save_torch, work_folder(asked.out) / ".last.ckpt.part"

    def killed(value: object, path: Path) -> None:
        if (path.parent / "last.ckpt").is_file():
            part.write_bytes(bytes(1000))
            raise KeyboardInterrupt
        save(value, path)

    monkeypatch.setattr(lightning, "save_torch", killed)
    with pytest.raises(KeyboardInterrupt):
        train(asked)
    assert part.is_file()
    seen = []

    def look(value: object, path: Path) -> None:
        seen.append(part.exists())
        save(value, path)

    monkeypatch.setattr(lightning, "save_torch", look)
    train(asked)
    assert seen == [False]


def test_predictors_that_do_not_fit_on_the_disk_keep_the_checkpoint(asked, monkeypatch):
    def full(value: object, path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patched:
        patched.setattr("sparsecast.predictors.checkpoint.save_torch", full)
        with pytest.raises(OSError, match=r"model_0\.pt.*the last finished epoch is kept"):
            train(asked)
    assert not asked.out.exists()
    assert not asked.out.with_name(".pred.part").exists()
    train(asked)
    assert asked.out.is_dir()
