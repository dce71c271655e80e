"""What a file of `torch.save` asks for, read from its pickles without obeying them.

torch allocates what a pickle names before it looks whether the file holds as much: the storages of
files before torch 1.6, members of a zip that unpack to more than the file, and objects that are
made of a size alone. `pickletools` lists a pickle's operations and runs none of them.
"""

from __future__ import annotations

import io
import mmap
import pickletools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile

from sparsecast.core.errors import reason_of
from sparsecast.core.options import short_repr

_PARTS = 4
"""Pickles at the beginning of a file before torch 1.6: magic number, version, machine, tensors."""
_FACTS = (0x1950A86A20F9469CFC6C, 1001)
"""Their magic number and version."""
_SIZED = re.compile(r"(builtins|__builtin__) bytearray|torch(\.\w+)* \w*Tensor")
"""What is made of a size alone. A saved tensor is rebuilt by a function, and names none of them."""


class Claim(Exception):
    """A file asks for something that it does not hold; the text says for what."""


def check_claims(path: Path, zipped: bool) -> None:
    """Check that the objects of a file are no larger than the file.

    Args:
        zipped: Whether it has torch's zip format.

    Raises:
        Claim: They are larger. Other damage is left to whoever loads the file.
    """
    size = path.stat().st_size
    stored: dict[Any, int] = {}
    for pickled in _zipped_pickles(path) if zipped else _plain_pickle(path):
        stored |= _storages(pickled, size)
    if sum(stored.values()) > size:
        raise Claim(f"its tensors have {sum(stored.values()):,} values, but it has {size:,} bytes")


def _zipped_pickles(path: Path) -> Iterator[Any]:
    size = path.stat().st_size
    try:
        with ZipFile(path) as archive:
            members = archive.infolist()
            read = (member for member in members if "/code/" not in member.filename)
            if any(member.compress_type != ZIP_STORED for member in read):
                raise Claim("it is compressed, which torch.save never does")
            if sum(member.file_size for member in members) > size:
                raise Claim("its parts are larger than the whole")
            for member in members:
                if member.filename.endswith("data.pkl"):
                    yield io.BytesIO(archive.read(member))
    except (BadZipFile, ValueError, RuntimeError, NotImplementedError) as error:
        told = reason_of(error).partition("'")[0].strip()  # names follow, as the file has them
        raise Claim(f"its table of parts is damaged ({told})") from error


def _plain_pickle(path: Path) -> Iterator[Any]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for _ in range(_PARTS):
            yield data


def _storages(pickled: Any, most: int) -> dict[Any, int]:
    """Return the number of values of each storage that a pickle names, by its key.

    Args:
        most: The largest number that may stand in it: no size or place in a file exceeds its bytes.
    """
    found: dict[Any, int] = {}
    memo: dict[Any, str] = {}
    text, frame = "", list[Any]()
    try:
        for operation, argument, place in pickletools.genops(pickled):
            name = operation.name
            if name == "GLOBAL" and _SIZED.fullmatch(str(argument)):
                raise Claim(f"it holds more than tensors ({str(argument).replace(' ', '.')})")
            if isinstance(argument, int) and argument > most and argument not in _FACTS:
                raise Claim(
                    f"it speaks of {short_repr(argument)} values, but it has {most:,} bytes"
                )
            if name == "MARK":
                frame = []
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = text
            elif name in ("BINGET", "LONG_BINGET"):
                frame.append(memo.get(argument, ""))
            elif name == "BINPERSID":
                texts = [item for item in frame if isinstance(item, str)]
                counts = [item for item in frame if isinstance(item, int)]
                found[texts[1] if len(texts) > 1 else place] = max(counts, default=0)
            elif isinstance(argument, (str, int)):
                text = argument if isinstance(argument, str) else ""
                frame.append(argument)
    except (ValueError, IndexError, OverflowError, MemoryError):
        pass  # no pickle, which torch says in its own words
    return found
