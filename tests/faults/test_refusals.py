"""Read-only folders, shares that drop, and clocks that jump."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

STALE = """
import builtins, io
from pathlib import Path
opened = io.open
def dropped(file, *args, **options):
    if str(file).startswith(SHARE):
        raise OSError(116, "Stale file handle", str(file))
    return opened(file, *args, **options)
io.open = builtins.open = dropped
"""
CLOCK = """
import random, time
draw = random.Random(0)
time.time = lambda: draw.uniform(0, 2e9)
"""


def told_once(process, *codes: int) -> str:
    _, error = process.communicate(120)
    assert process.returncode in codes, error
    assert "Traceback" not in error
    (line,) = (line for line in error.splitlines() if line.startswith("sparsecast: "))
    return line


@pytest.mark.slow
@pytest.mark.parametrize("name", ["collect", "train", "sparsify", "export", "report"])
def test_a_folder_on_a_read_only_disk_is_refused_first(stage, name):
    one = stage(name)
    one.out = Path("/proc/out")
    assert "/proc/out: cannot be written" in told_once(one.run(), 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train", "export", "report"])
def test_a_share_that_drops_is_told_with_the_file(stage, acts, name):
    one = stage(name)
    told = told_once(one.run(STALE.replace("SHARE", repr(str(acts.folder)))), 1, 2)
    assert os.strerror(errno.ESTALE) in told
    assert str(acts.folder) in told
    assert not one.out.exists()
    assert one.finish()
    assert one.left() == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["collect", "train", "sparsify"])
def test_a_clock_that_jumps_and_files_of_the_future_change_no_byte(stage, name):
    one = stage(name)
    whole = one.finish()
    one.clear()
    process = one.run(CLOCK)
    process.process.join(1)
    process.process.kill()
    process.process.join()
    for path in one.out.parent.rglob("*"):
        os.utime(path, (4e9, 4e9))
    process = one.run(CLOCK)
    _, error = process.communicate(120)
    assert process.returncode == 0, error
    assert one.content() == whole


@pytest.mark.slow
def test_a_writer_thread_that_fails_ends_the_collection(stage):
    one = stage("collect")
    code = """
from sparsecast.collect.store import writer
sync, calls = os.fsync, iter(range(99))
def failing(number):
    if next(calls) == 2:
        raise OSError(5, "Input/output error")
    sync(number)
writer.os.fsync = failing
"""
    told = told_once(one.run(code), 1)
    assert "Input/output error" in told
    assert "finished shards are kept, the same command goes on from there" in told
    assert one.finish()
    assert one.left() == ["out"]
