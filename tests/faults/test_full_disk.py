"""Disks of every size: a run succeeds, or says what it needs and leaves nothing like an output."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

STEPS = 20
PAGE = 4096
NEEDS = re.compile(r"needs [\d.,]+ [kMGT]?B")
MEANWHILE = "from sparsecast.core import disk\ndisk.free_bytes = lambda path: 2**40\n"
"""There seems to be room at the start, as where another program fills the disk later."""


class SmallDisk:
    """A tmpfs that grows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def resize(self, nbytes: int, how: str = "remount,") -> None:
        options = ["-t", "tmpfs", "-o", f"{how}size={nbytes}", "tmpfs", str(self.folder)]
        subprocess.run(["mount", *options], check=True, capture_output=True)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[SmallDisk]:
    disk = SmallDisk(tmp_path / "disk")
    disk.folder.mkdir()
    try:
        disk.resize(PAGE, how="")
    except (subprocess.CalledProcessError, FileNotFoundError):
        pytest.skip("no tmpfs can be mounted here")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk.folder)], check=True)


def sizes(whole: dict[str, bytes]) -> list[int]:
    """From 1 MiB, or a twentieth of a smaller output, to the output's own."""
    own = sum(-(-len(raw) // PAGE) * PAGE for raw in whole.values())
    least = min(2**20, own // STEPS)
    return [least + (own - least) * step // (STEPS - 1) for step in range(STEPS)]


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "meanwhile"])
@pytest.mark.parametrize("name", ["collect", "train", "sparsify", "export", "report"])
def test_a_disk_of_any_size_is_enough_or_told(stage, small_disk, name, when):
    """What a run leaves stays for the next one, on a disk that is a little larger."""
    small_disk.resize(2**28)
    one = stage(name, small_disk.folder)
    whole = one.finish()
    one.out.unlink() if one.out.is_file() else subprocess.run(["rm", "-r", one.out], check=True)
    full = 0
    for size in sizes(whole):
        small_disk.resize(max(size, one.held()))
        process = one.run(MEANWHILE if when == "meanwhile" else "")
        _, error = process.communicate(120)
        if process.returncode == 0:
            break
        full += 1
        assert not one.out.exists()
        (told,) = (line for line in error.splitlines() if line.startswith("sparsecast: "))
        assert process.returncode == (1 if "No space left" in told else 2), told
        assert NEEDS.search(told), told
        assert "Traceback" not in error
        assert ".out.lock" not in one.left()
    assert full
    small_disk.resize(2**28)
    assert one.finish() == whole
    assert one.left() == [one.out.name]


@pytest.mark.slow
def test_scores_without_room_are_told_with_what_they_take(stage, small_disk):
    one = stage("evaluate", small_disk.folder)
    (small_disk.folder / "another").write_bytes(bytes(PAGE))
    process = one.run()
    _, error = process.communicate(120)
    (told,) = (line for line in error.splitlines() if line.startswith("sparsecast: "))
    assert process.returncode == 1
    assert "No space left" in told
    assert NEEDS.search(told)
    assert told.endswith("the result is on the screen: make room and run the same command again")
    assert one.left() == ["another"]
    (small_disk.folder / "another").unlink()
    assert len(one.finish()) == 1
