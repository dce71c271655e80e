"""Files of a user's are read, or refused in one line that says what is wrong with them."""

import os

import pytest

from sparsecast.core.errors import InputError
from sparsecast.core.files import read_json

WHAT = "the list of things"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ('{"a": NaN}', "NaN is no JSON number"),
        ('{"a": -Infinity}', "-Infinity is no JSON number"),
        ('{"a": 1e999}', "1e999 is beyond the range of numbers"),
        ('{"a": ' + "9" * 5000 + "}", "is not JSON"),
        ('{"a": 1', "is not JSON"),
        ("", "is not JSON"),
        ("[1]", "expected a JSON object"),
        (b"\xff\xfe{\x00}\x00", "is not JSON"),
    ],
)
def test_what_is_no_json_object_is_refused_in_one_line(tmp_path, text, told):
    path = tmp_path / "things.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError) as refused:
        read_json(path, WHAT)
    assert told in str(refused.value)
    assert str(path) in str(refused.value)
    assert WHAT in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400


def test_a_byte_order_mark_is_no_damage(tmp_path):
    (tmp_path / "things.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "things.json", WHAT) == {"a": 1}


def test_missing_folder_fifo_and_device_are_told_apart(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("{}")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    told = {
        "gone": "no such file",
        "file/below": "no such file",
        "folder": "is a folder",
        "fifo": "is a FIFO",
        "loop": "Too many levels of symbolic links",
    }
    for name, words in told.items():
        with pytest.raises(InputError, match=words):
            read_json(tmp_path / name, WHAT)
    with pytest.raises(InputError, match="is a device"):
        read_json(tmp_path / ".." / ".." / ".." / ".." / ".." / ".." / "dev" / "null", WHAT)


def test_a_file_that_may_not_be_read_is_not_called_missing(as_nobody):
    path = as_nobody.folder / "things.json"
    path.write_text("{}")
    path.chmod(0)
    with as_nobody(), pytest.raises(InputError, match=r"may not be read \(Permission denied\)"):
        read_json(path, WHAT)
