"""Room on a disk, and outputs that cannot be written."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import save_file

from sparsecast.collect.output import output_folder
from sparsecast.core.disk import (
    check_disk_space,
    explain_full_disk,
    format_bytes,
    free_bytes,
    full_disk_errno,
)
from sparsecast.core.errors import InputError
from sparsecast.core.files import check_new_folder, check_writable_file, write_json
from sparsecast.core.lock import lock_folder
from sparsecast.core.torch_files import save_torch


@contextmanager
def small_files(nbytes: int):
    """No file may grow beyond so many bytes, as on a disk that fills up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("nbytes", "words"),
    [(0, "0 B"), (1234, "1.23 kB"), (123e9, "123 GB"), (999.4, "999 B"), (999.6, "1 kB")],
)
def test_sizes_in_words(nbytes, words):
    assert format_bytes(nbytes) == words


def test_more_than_the_disk_has_is_refused(tmp_path):
    there = free_bytes(tmp_path / "not" / "yet")
    assert there == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.2)
    check_disk_space(tmp_path / "a", there // 2, "the store")
    with pytest.raises(InputError, match=r"the store needs .* free there; .*, or fewer --tokens$"):
        check_disk_space(tmp_path / "a", 10**18, "the store", ", or fewer --tokens")


VALUE = {"w": torch.zeros(2**20)}


@pytest.mark.parametrize("write", [save_file, lambda v, p: p.write_bytes(bytes(2**20)), save_torch])
def test_a_full_disk_is_recognized_in_whatever_a_library_raises(tmp_path, write):
    with small_files(2**16), pytest.raises((OSError, SafetensorError)) as caught:
        write(VALUE, tmp_path / "x")
    assert full_disk_errno(caught.value) == errno.EFBIG


@pytest.mark.parametrize(
    "error", [OSError(errno.EACCES, "no"), RuntimeError("os error 28"), KeyError()]
)
def test_other_errors_are_not_taken_for_a_full_disk(error):
    assert full_disk_errno(error) is None


def test_a_full_disk_is_told_with_what_it_takes(tmp_path):
    with (
        pytest.raises(OSError, match="x.pt") as failed,
        small_files(2**16),
        explain_full_disk(tmp_path / "out", 5_000_000, "the thing", lambda: "all is kept"),
    ):
        save_torch(VALUE, tmp_path / "x.pt")
    said = str(failed.value)
    assert f"{tmp_path / 'out'}: cannot be written (x.pt: File too large)" in said
    assert "the thing needs 5 MB of disk" in said
    assert "are free there now; all is kept" in said
    with (
        pytest.raises(PermissionError),
        explain_full_disk(tmp_path, 1, "it", lambda: pytest.fail("not full")),
    ):
        raise PermissionError(errno.EACCES, "no")


CHECKS = [output_folder, check_new_folder]


@pytest.mark.parametrize("check", CHECKS)
def test_an_out_that_no_folder_can_be_is_refused_first(check, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    told = {
        "/proc/acts": "/proc/acts: cannot be written",
        "/proc/self/acts": "cannot be written",
        "/dev/null": "expected (a folder|one) to write",
        "/dev/null/acts": "cannot be written",
        "/": "cannot be replaced as a whole",
        str(tmp_path / "loop"): "links lead in a loop",
        str(tmp_path / "loop" / "acts"): "Too many levels of symbolic links",
        str(tmp_path / "file" / "acts"): "Not a directory",
        str(tmp_path / ("x" * 300)): "File name too long",
    }
    for path, words in told.items():
        with pytest.raises(InputError, match=words):
            check(Path(path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "loop"]


@pytest.mark.parametrize("check", CHECKS)
def test_an_out_in_a_closed_folder_is_refused_first(check, as_nobody):
    for name, mode in (("closed", 0), ("readable", 0o555)):
        (as_nobody.folder / name).mkdir()
        (as_nobody.folder / name).chmod(mode)
        with as_nobody(), pytest.raises(InputError, match=r"cannot be written \(Permission denied"):
            check(as_nobody.folder / name / "deep" / "acts")


def test_links_to_folders_are_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "coming").symlink_to(tmp_path / "new" / "acts")
    for check in CHECKS:
        assert check(tmp_path / "link") == tmp_path / "real"
        assert check(tmp_path / "coming") == tmp_path / "new" / "acts"


def test_json_that_cannot_be_written_is_refused_first(tmp_path, as_nobody):
    (tmp_path / "file").touch()
    for path in ("/proc/x.json", tmp_path, tmp_path / "file" / "x.json", "/dev/fd/999"):
        with pytest.raises(InputError, match="--json: .* cannot be written"):
            check_writable_file(Path(path), "--json")
    as_nobody.folder.chmod(0o755)
    with as_nobody(), pytest.raises(InputError, match="Permission denied"):
        check_writable_file(as_nobody.folder / "x.json", "--json")
    check_writable_file(tmp_path / "new" / "x.json", "--json")
    check_writable_file(Path("/dev/null"), "--json")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_what_is_no_file_is_written_as_it_is(tmp_path):
    """A device that is replaced by a file stays one for everybody."""
    write_json(Path("/dev/null"), {})
    assert not Path("/dev/null").is_file()
    read, write = os.pipe()
    check_writable_file(Path(f"/dev/fd/{write}"), "--json")
    write_json(Path(f"/dev/fd/{write}"), {"a": 1})
    os.close(write)
    with os.fdopen(read) as file:
        assert json.load(file) == {"a": 1}
    path = tmp_path / "log"
    with path.open("w") as log:
        log.write("before\n")
        log.flush()
        write_json(Path(f"/dev/fd/{log.fileno()}"), {"a": 1})
        log.write("after\n")
    assert path.read_text() == 'before\n{\n  "a": 1\n}\nafter\n'


def test_a_file_that_could_not_be_written_is_named_and_leaves_nothing(tmp_path):
    with small_files(10), pytest.raises(OSError, match="File too large") as failed:
        write_json(tmp_path / "x.json", list(range(100)))
    assert failed.value.filename == str(tmp_path / "x.json")
    assert list(tmp_path.iterdir()) == []


HOLD = """
import sys, time
from pathlib import Path
from sparsecast.core.lock import lock_folder
with lock_folder(Path(sys.argv[1]), "export"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_refused_until_the_first_ends_or_is_killed(tmp_path):
    out = tmp_path / "new" / "bundle"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, out], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with (
        pytest.raises(InputError, match="another export is writing it"),
        lock_folder(out, "export"),
    ):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with lock_folder(out, "export"):
        pass
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("again", [False, True], ids=["removed", "another's"])
def test_a_lock_on_a_file_that_its_holder_has_just_removed_is_none(tmp_path, monkeypatch, again):
    acquire = FileLock.acquire

    def late(lock, *args, **kwargs):
        got = acquire(lock, *args, **kwargs)
        os.unlink(lock.lock_file)
        if again:
            Path(lock.lock_file).touch()
        return got

    monkeypatch.setattr(FileLock, "acquire", late)
    with (
        pytest.raises(InputError, match="another export is writing it"),
        lock_folder(tmp_path / "out", "export"),
    ):
        pass
    assert len(list(tmp_path.iterdir())) == again
