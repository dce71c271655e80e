"""Decode text as UTF-8, with a warning at the first invalid byte.

UTF-16 and binary files are refused. Single bytes that are not UTF-8 become U+FFFD, as everywhere,
but whoever reads them is told at once which byte it was and what the file looks like.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from io import BufferedReader, IncrementalNewlineDecoder, TextIOWrapper

from sparsecast.core.errors import InputError
from sparsecast.core.messages import log

BLOCK = 2**20
"""Characters."""
WIDE = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
"""Byte order marks, the longer ones first: one begins with another."""
_ESCAPED = re.compile("[\udc80-\udcff]")
"""Bytes that are not UTF-8, as the error handler `surrogateescape` spells them."""
_NEARBY = 2**12


class Utf8Reader:
    """A stream of bytes decoded as lines or as blocks of text, with line ends as `\\n` in blocks.

    Memory: a block, or a line.
    """

    def __init__(self, raw: BufferedReader, where: str) -> None:
        """
        Args:
            where: The file's name in messages.

        Raises:
            InputError: The stream begins with the byte order mark of UTF-16 or UTF-32.
        """
        self._where = where
        self._at = 0
        self._replaced = 0
        head = raw.peek(4)
        for mark, name in WIDE.items():
            if head.startswith(mark):
                raise InputError(
                    f"{where}: begins with the byte order mark of {name}, expected UTF-8; convert "
                    f"it with `iconv -f {name} -t UTF-8`"
                )
        if head.startswith(codecs.BOM_UTF8):
            self._at = len(codecs.BOM_UTF8)
        self._text = TextIOWrapper(raw, "utf-8-sig", errors="surrogateescape", newline="")

    def line(self, most: int = -1) -> str:
        """Read the next line, at most `most` characters of it; empty at the end."""
        return self._checked(self._text.readline(most))

    def lines(self) -> Iterator[str]:
        while line := self.line(BLOCK):
            while not line.endswith(("\n", "\r")) and (more := self.line(BLOCK)):
                line += more
            yield line

    def blocks(self, first: str = "") -> Iterator[str]:
        """Yield `first`, which was read already, and then the rest of the stream in blocks."""
        ends = IncrementalNewlineDecoder(None, translate=True)
        yield ends.decode(first)
        while block := self._text.read(BLOCK):
            yield ends.decode(self._checked(block))
        yield ends.decode("", final=True)

    def tell_replaced(self) -> None:
        """Log how many bytes were replaced."""
        if self._replaced:
            _warn(
                f"{self._where}: {self._replaced:,} characters are not UTF-8 and were read as "
                "U+FFFD"
            )

    def _checked(self, part: str) -> str:
        if (nul := part.find("\0")) >= 0:
            raise InputError(
                f"{self._where}: holds NUL bytes, the first at offset "
                f"{self._at + _nbytes(part[:nul]):,}, so it is binary or UTF-16; expected UTF-8 "
                "text: convert it with `iconv -f UTF-16 -t UTF-8`, or leave it out"
            )
        start, self._at = self._at, self._at + _nbytes(part)
        if part.isascii() or (bad := _ESCAPED.search(part)) is None:
            return part
        if not self._replaced:
            self._tell_first(part, bad.start(), start)
        sound = part.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        self._replaced += sound.count("\ufffd") - part.count("\ufffd")
        return sound

    def _tell_first(self, part: str, place: int, start: int) -> None:
        offset = start + _nbytes(part[:place])
        near = part[max(0, place - _NEARBY) : place + _NEARBY].encode("utf-8", "surrogateescape")
        _warn(
            f"{self._where}: the byte 0x{ord(part[place]) - 0xDC00:02x} at offset {offset:,} is "
            f"not UTF-8 and is read as U+FFFD; {_looks_like(near)}"
        )


def _nbytes(part: str) -> int:
    return len(part) if part.isascii() else len(part.encode("utf-8", "surrogateescape"))


def _looks_like(near: bytes) -> str:
    """Advise on text that looks as if it had another encoding."""
    runs = re.findall(rb"[\x80-\xff]+", near)
    sound = sum(len(run.decode("utf-8", "ignore").encode()) for run in runs)
    if 2 * sound > sum(map(len, runs)):
        return "the text around it is UTF-8, so that byte may be damage"
    if max(map(len, runs)) <= 2:
        return (
            "the file looks like Windows-1252 or Latin-1: convert it with "
            "`iconv -f WINDOWS-1252 -t UTF-8`"
        )
    return (
        "the file looks like an older encoding of Asian, Cyrillic or Greek text: convert it with "
        "`iconv -f GB18030 -t UTF-8`, or SHIFT_JIS, WINDOWS-1251 and so on"
    )


def _warn(text: str) -> None:
    log.warning(text)
