"""Faults that any file may have: cut short, changed, emptied, or no file at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

Edit = Callable[[bytes], bytes]


def rewritten(edit: Edit, name: str = "") -> Callable[[Path], None]:
    """Damage that passes a file, or the file `name` in a folder, through a function."""

    def damage(path: Path) -> None:
        file = path / name if name else path
        file.write_bytes(edit(file.read_bytes()))

    return damage


def content(data: bytes | str, name: str = "") -> Callable[[Path], None]:
    """Damage that replaces a whole file."""
    raw = data.encode() if isinstance(data, str) else data
    return rewritten(lambda _: raw, name)


def cut(keep: int | float, name: str = "") -> Callable[[Path], None]:
    """Keep so many bytes, all but so many if negative, or this share of them."""

    def edit(raw: bytes) -> bytes:
        return raw[: int(len(raw) * keep) if isinstance(keep, float) else keep]

    return rewritten(edit, name)


def flipped(at: int, bit: int = 0, name: str = "") -> Callable[[Path], None]:
    def edit(raw: bytes) -> bytes:
        changed = bytearray(raw)
        changed[at] ^= 1 << bit
        return bytes(changed)

    return rewritten(edit, name)


def put(at: int, data: bytes, name: str = "") -> Callable[[Path], None]:
    """Overwrite the bytes from a place on."""

    def edit(raw: bytes) -> bytes:
        start = at % len(raw) if at < 0 else at
        return raw[:start] + data + raw[start + len(data) :]

    return rewritten(edit, name)


def replaced(old: bytes, new: bytes, name: str = "") -> Callable[[Path], None]:
    """Replace every occurrence; there has to be one."""

    def edit(raw: bytes) -> bytes:
        assert old in raw, old
        return raw.replace(old, new)

    return rewritten(edit, name)


def appended(data: bytes, name: str = "") -> Callable[[Path], None]:
    return rewritten(lambda raw: raw + data, name)


def _emptied(path: Path) -> None:
    path.write_bytes(b"")


def _gone(path: Path) -> None:
    path.unlink()


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def _loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def _dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("nowhere"))


KINDS: dict[str, Callable[[Path], None]] = {
    "empty": _emptied,
    "gone": _gone,
    "a folder": _folder,
    "a FIFO": _fifo,
    "a link to a device": _device,
    "a link to itself": _loop,
    "a link to nothing": _dangling,
}


def in_folder(damage: Callable[[Path], object], name: str) -> Callable[[Path], object]:
    """Damage to a file of a folder."""
    return lambda folder: damage(folder / name)


def linked(name: str = "") -> Callable[[Path], None]:
    """A link to the sound file, elsewhere: read as if it were here."""

    def damage(path: Path) -> None:
        file = path / name if name else path
        there = file.parent.parent / f"elsewhere-{file.name}"
        file.rename(there)
        file.symlink_to(there)

    return damage
