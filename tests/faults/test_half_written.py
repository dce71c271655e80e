"""What a kill at the worst moment leaves: old or new outputs, and checkpoints cut short."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from sparsecast.core.errors import InputError
from sparsecast.core.files import new_folder
from sparsecast.core.lock import lock_folder
from sparsecast.core.torch_files import load_state

KILL_IN = """
calls = iter(range(99))
def killed(*args, **options):
    if next(calls) == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    return before(*args, **options)
before, {name} = {name}, killed
"""
"""Kill at the call of a function with this number."""


def write(out: Path, text: str) -> None:
    with new_folder(out, replaces="a") as folder:
        for name in "ab":
            (folder / name).write_text(text)


@pytest.fixture
def replaced(tmp_path):
    """An output that an earlier run has written."""
    out = tmp_path / "out"
    write(out, "old")
    return out


@pytest.mark.parametrize("call", range(5))
@pytest.mark.parametrize("name", ["os.replace", "os.rmdir", "os.unlink"])
def test_a_replaced_folder_is_old_or_new_at_every_moment(replaced, name, call):
    child = os.fork()
    if child == 0:
        exec(KILL_IN.format(name=name, call=call), {"os": os, "signal": signal})
        write(replaced, "new")
        os._exit(0)
    os.waitpid(child, 0)
    hidden = replaced.with_name(".out.earlier")
    there = replaced if replaced.exists() else hidden
    assert [(there / part).read_text() for part in "ab"] in (["old"] * 2, ["new"] * 2)
    with pytest.raises(KeyError), new_folder(replaced, replaces="a"):
        raise KeyError  # a run that fails leaves what it found
    assert [(replaced / part).read_text() for part in "ab"] in (["old"] * 2, ["new"] * 2)
    write(replaced, "newer")
    assert [(replaced / part).read_text() for part in "ab"] == ["newer"] * 2
    assert [path.name for path in replaced.parent.iterdir()] == ["out"]


def test_a_folder_that_cannot_get_its_name_leaves_the_old_one(replaced, monkeypatch):
    rename = os.replace

    def fail(source: Path, to: Path) -> None:
        if source == replaced.with_name(".out.part"):
            raise OSError(5, "Input/output error", str(to))
        rename(source, to)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="Input/output error"):
        write(replaced, "new")
    assert (replaced / "a").read_text() == "old"
    assert [path.name for path in replaced.parent.iterdir()] == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["collect", "train", "sparsify", "export", "report"])
def test_the_lock_that_a_killed_run_leaves_goes_with_the_next(stage, name):
    one = stage(name)
    whole = one.finish()
    held = one.out.with_name(".out.lock")
    held.touch()
    assert one.finish() == whole
    assert one.left() == ["out"]
    with lock_folder(one.out, "run"):  # another's
        process = one.run()
        code = 2 if name in ("export", "report") else 0
        _, error = process.communicate()
        assert process.returncode == code, error
        assert held.exists()


CHECKPOINT = {
    "train": """
from sparsecast.core import lightning
saves, save = iter(range(99)), lightning.save_torch
def killed(value, path):
    save(value, path)
    if next(saves) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
lightning.save_torch = killed
""",
    "sparsify": """
from sparsecast.core import lightning
saves, save = iter(range(99)), lightning.save_torch
def killed(value, path):
    save(value, path)
    if path.name.startswith("ProSparse"):
        os.kill(os.getpid(), signal.SIGKILL)
lightning.save_torch = killed
""",
}
"""Killed behind a checkpoint: of the second epoch, and of the second phase."""


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKPOINT)
def test_a_checkpoint_cut_anywhere_is_named_and_costs_what_came_after_the_one_before(stage, name):
    one = stage(name)
    whole = one.finish()
    one.clear()
    process = one.run(CHECKPOINT[name])
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    work = one.out.with_name(".out.train" if name == "train" else ".out.work")
    (last,) = work.glob("*.ckpt")
    raw = last.read_bytes()
    for share in (0, 0.3, 0.999):
        last.write_bytes(raw[: int(share * len(raw))])
        process = one.run()
        _, error = process.communicate()
        assert process.returncode == 2, error
        (told,) = (line for line in error.splitlines() if line.startswith("sparsecast: "))
        assert told.startswith(f"sparsecast: {last}: damaged, expected the state of an")
        assert "remove it, and the same command goes on from what was finished before" in told
        assert last.exists()
    kept = {path.name for path in work.glob("*.pt")}
    assert kept == (set() if name == "train" else {"pre-training.pt"})
    last.unlink()
    assert one.finish() == whole
    assert one.left() == ["out"]


@pytest.mark.parametrize("nbytes", [0, 3, 30, 300, -30, -1])
def test_a_state_that_is_cut_short_is_told_in_our_words(tmp_path, nbytes):
    path = tmp_path / "last.ckpt"
    torch.save({"epoch": 1, "state_dict": {"w": torch.rand(99)}}, path)
    path.write_bytes(path.read_bytes()[:nbytes])
    with pytest.raises(InputError, match=r"last.ckpt: damaged, expected .*; remove it"):
        load_state(path, "epoch")
